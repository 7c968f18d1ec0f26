//! The first process of a test VM: mounts, modules, the tests, power off.
//!
//! Output: what the tests print, on the serial console; `vm: clock SECONDS` at the beginning and the end, by this kernel's
//! clock, which the host compares with its own; `vm: exit CODE` at the end.

use std::{
    env,
    ffi::CString,
    fs,
    io::{self, BufRead as _, BufReader, Read, Write as _},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
    thread,
};

fn main() {
    let code = match prepare().and_then(|()| run()) {
        Ok(code) => code,
        Err(error) => {
            println!("vm: {error}");
            1
        }
    };
    clock();
    println!("vm: exit {code}");
    // The console may be gone: there is nobody else to tell.
    let _ = io::stdout().flush();
    // SAFETY: reboot and sync take no pointers; this is process 1 of a machine that exists for this test alone.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
}

/// How old this machine is by its own clock (proc(5), /proc/uptime).
fn clock() {
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    println!("vm: clock {}", uptime.split(' ').next().unwrap_or_default());
}

/// What this machine is besides a kernel: a parameter that the kernel does not know is a variable of this process.
fn mode() -> String {
    env::var(MODE).unwrap_or_default()
}

const MODE: &str = "REBALANCER_VM_MODE";

fn prepare() -> io::Result<()> {
    let mode = mode();
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("securityfs", "/sys/kernel/security"),
    ] {
        if kind == "cgroup2" && mode == "no-cgroup2" {
            continue;
        }
        fs::create_dir_all(target)?;
        if let Err(error) = mount(kind, target) {
            println!("vm: {kind} on {target}: {error}");
        }
    }
    println!(
        "vm: kernel {}",
        fs::read_to_string("/proc/sys/kernel/osrelease")?.trim()
    );
    clock();
    let said = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    println!(
        "vm: mode {mode:?}, lockdown {}, clock source {}",
        said("/sys/kernel/security/lockdown"),
        said("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    );
    let mut modules: Vec<_> = fs::read_dir("/modules")?.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    for module in modules {
        if let Err(error) = load(&module) {
            println!("vm: module {}: {error}", module.display());
        }
    }
    let up = Command::new("/bin/ip").args(["link", "set", "lo", "up"]).status()?;
    println!("vm: loopback {up}");
    Ok(())
}

fn mount(kind: &str, target: &str) -> io::Result<()> {
    let (kind, target) = (CString::new(kind)?, CString::new(target)?);
    // SAFETY: the strings live through the call and end in zero; no data is passed.
    let result = unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn load(module: &Path) -> io::Result<()> {
    let file = fs::File::open(module)?;
    // SAFETY: the descriptor is open, the parameters are an empty string that lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What a container runtime does for a pod: a cgroup of its own, which a namespace makes the root of what it sees.
fn enter_container() -> io::Result<()> {
    const OWN: &str = "/sys/fs/cgroup/pod";
    fs::create_dir_all(OWN)?;
    fs::write(format!("{OWN}/cgroup.procs"), "0")?;
    // SAFETY: unshare and mount take integers and strings that live through the calls; no data is passed.
    let failed = unsafe {
        libc::unshare(libc::CLONE_NEWCGROUP | libc::CLONE_NEWNS) != 0
            || libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) != 0
            || libc::umount2(c"/sys/fs/cgroup".as_ptr(), 0) != 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    mount("cgroup2", "/sys/fs/cgroup")
}

/// Puts each line on the console whole: both streams of a program end there, and the host reads figures among them.
fn show(from: impl Read) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line)? > 0 {
        if !line.ends_with(b"\n") {
            line.push(b'\n');
        }
        io::stdout().lock().write_all(&line)?;
        line.clear();
    }
    Ok(())
}

fn run() -> io::Result<i32> {
    let mut arguments = env::args_os().skip(1);
    let program = arguments
        .next()
        .ok_or_else(|| io::Error::other("the kernel's command line names no program behind `--`"))?;
    let mut command = Command::new(program);
    if mode() == "cgroup-namespace" {
        // SAFETY: the closure makes system calls and allocates, which is fine in a process with one thread.
        unsafe {
            command.pre_exec(enter_container);
        }
    }
    let mut child = command
        .args(arguments)
        .env("PATH", "/bin")
        .env("HOME", "/tmp")
        .env("REBALANCER_BIN", "/bin/rebalancer")
        .env("REBALANCER_VM", "1")
        .env("REBALANCER_SWARM", "/bin/swarm")
        .env("REBALANCER_KUBELETS", "/bin/kubelets")
        .env("REBALANCER_SKIPS", "/tmp/skips")
        // The console is no terminal to draw on.
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let errors = child.stderr.take().map(|from| thread::spawn(move || show(from)));
    if let Some(from) = child.stdout.take() {
        show(from)?;
    }
    if let Some(errors) = errors {
        // A console that is gone is nobody's to tell.
        let _ = errors.join();
    }
    let status = child.wait()?;
    for line in fs::read_to_string("/tmp/skips").unwrap_or_default().lines() {
        println!("vm: skipped {line}");
    }
    Ok(status.code().unwrap_or(1))
}
