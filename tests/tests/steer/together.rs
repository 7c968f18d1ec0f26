//! Who else may be there: a second agent, a program that does not know the agent's lock, other tools' probes. The server
//! lives, and nobody but victims is told.

use std::{
    env,
    fs::File,
    io,
    os::fd::{FromRawFd as _, OwnedFd},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
};

use rebalancer::steer::{Part, Program, cost_program};
use rebalancer_core::binary::golang;
use rebalancer_tests::{h2client::Client, process::Process};

use crate::world::{PORT, World};

/// The highest that kube-apiserver takes: a lottery that ran would be heard.
const CHANCE: &str = "0.02";

/// Requests while two are there: those of minutes by `REBALANCER_LONG`.
fn many() -> u64 {
    if env::var_os("REBALANCER_LONG").is_some() {
        10_000
    } else {
        600
    }
}

/// Clients that ask without a pause, and must never be told to go.
struct Load<'a> {
    world: &'a World,
    over: AtomicBool,
    requests: AtomicU64,
}

impl Load<'_> {
    /// Does something while others ask; with the requests that were answered.
    fn during<T: Send>(world: &World, act: impl FnOnce(&dyn Fn(u64)) -> T + Send) -> (T, u64) {
        let load = Load {
            world,
            over: AtomicBool::new(false),
            requests: AtomicU64::new(0),
        };
        thread::scope(|scope| {
            let clients: Vec<_> = (0..3).map(|_| scope.spawn(|| load.ask())).collect();
            // So many requests later, or when a client is lost: its panic says why.
            let pass = |requests: u64| {
                let until = load.requests.load(Relaxed) + requests;
                while load.requests.load(Relaxed) < until && !clients.iter().any(thread::ScopedJoinHandle::is_finished)
                {
                    thread::yield_now();
                }
            };
            let acted = act(&pass);
            load.over.store(true, Relaxed);
            for client in clients {
                client.join().expect("each client is answered");
            }
            (acted, load.requests.load(Relaxed))
        })
    }

    fn ask(&self) {
        let mut client = Client::connect(&self.world.pki, self.world.hub(), self.world.address());
        while !self.over.load(Relaxed) {
            client.get_at_once("/", 10);
            self.requests.fetch_add(10, Relaxed);
            assert_eq!(client.goaways(), 0, "nobody is told who is no victim");
        }
    }
}

/// A program that answers, put there without a look at who else is there: as an agent would that does not know the lock.
fn careless(world: &World) -> Program {
    let node = world.node().clone();
    let program = thread::spawn(move || {
        node.enter().expect("its own namespace");
        cost_program(Part::STEER, PORT).expect("the kernel takes it")
    });
    program.join().expect("the thread ends well")
}

fn expect_life(world: &mut World) {
    let server = world.server.as_mut().expect("a server");
    server.is_running().expect("the server lives");
    for word in [
        "panic",
        "fatal error",
        "SIGSEGV",
        "SIGILL",
        "unexpected fault",
        "unknown caller pc",
    ] {
        assert!(!server.log().contains(word), "{}", server.log());
    }
}

/// One victim and one that is none, one of whom is told.
fn expect_obedience(world: &mut World) {
    let mut clients = world.clients(2);
    world.wait_until_known(&clients);
    world.order(clients[0].address);
    for client in &mut clients {
        client.get("/");
    }
    clients[0].wait_for_goaway();
    assert_eq!(clients[1].goaways(), 0);
}

fn answers(world: &mut World, answer: &str) -> f64 {
    let label = format!("answer=\"{answer}\"");
    world.metric("rebalancer_steer_answers_total", &label).expect("metrics")
}

/// Whether the agent says that for a reason like this nothing can be told: with one apiserver its hold is another one.
fn says(world: &World, reason: &str) -> Option<()> {
    let log = world.agent.as_ref().map(Process::log).unwrap_or_default();
    log.lines()
        .any(|line| {
            line.contains(reason) && (line.contains("nothing is told to go") || line.contains("no probe for now"))
        })
        .then_some(())
}

#[test]
fn a_second_agent_is_refused_and_the_first_goes_on() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    world.wait_until_ready();
    let (refusals, requests) = Load::during(&world, |pass| {
        pass(many() / 10);
        // As the first one was started, and as one that has nothing in common with it but the apiserver.
        let refusals = ["agent.sock", "other.sock"].map(|socket| world.refused_at("steer:auto", socket));
        pass(many());
        refusals
    });
    let [same, other] = refusals;
    assert!(same.1.contains("is in use"), "{}", same.1);
    assert_eq!(other.0, Some(2), "{}", other.1);
    assert!(other.1.contains("another agent has a probe on process"), "{}", other.1);
    eprintln!("{requests} requests; {}", other.1.lines().last().unwrap_or_default());
    expect_life(&mut world);
    assert_eq!(answers(&mut world, "taken"), 0.0);
    expect_obedience(&mut world);
    // The lock goes with the agent that has it.
    world.agent.take().expect("an agent").kill();
    world.start_agent("steer:auto", &[]);
    expect_obedience(&mut world);
    expect_life(&mut world);
}

#[test]
fn a_program_that_comes_after_the_agents_hurts_nobody_and_is_noticed() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    world.wait_until_ready();
    let (other, requests) = Load::during(&world, |pass| {
        pass(many() / 10);
        let other = careless(&world);
        pass(many());
        other
    });
    expect_life(&mut world);
    let mut client = Client::connect(&world.pki, world.hub(), world.address());
    world.wait("the agent holds", |world| {
        // Each request is one that the other has answered.
        client.get("/");
        says(world, "another program answers")
    });
    let taken = answers(&mut world, "taken");
    eprintln!("{requests} requests with a program behind the agent's, of which it left {taken} to the other");
    assert!(taken >= 1.0 && taken <= requests as f64 + client.requests as f64);
    drop(other);
    expect_obedience(&mut world);
    expect_life(&mut world);
}

#[test]
fn a_program_that_was_there_before_is_not_joined_and_two_of_them_hurt_nobody() {
    let Some(mut world) = World::get() else { return };
    world.start_server(CHANCE);
    let first = careless(&world);
    let ((), requests) = Load::during(&world, |pass| {
        let (code, said) = world.refused_at("steer:auto", "agent.sock");
        assert_eq!(code, Some(2), "{said}");
        assert!(
            said.contains("there is a breakpoint on the decider of process"),
            "{said}"
        );
        pass(many() / 10);
        let second = careless(&world);
        pass(many());
        // Whichever goes first.
        drop(first);
        pass(many() / 10);
        let third = careless(&world);
        pass(many());
        drop(third);
        pass(many() / 10);
        // Until the load is over somebody answers, so that no lottery runs.
        std::mem::forget(second);
    });
    eprintln!("{requests} requests with one, two, one, two and one programs");
    expect_life(&mut world);
}

/// A probe as perf and bpftrace put it there: it only counts (perf_event_open(2), the PMU `uprobe`).
pub fn foreign_probe(binary: &Path, offset: u64, on_return: bool) -> io::Result<File> {
    // include/uapi/linux/perf_event.h, `struct perf_event_attr`, version 1.
    #[repr(C)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        unused: [u64; 4],
        _wakeup: u32,
        _breakpoint: u32,
        path: u64,
        offset: u64,
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let kind = read("/sys/bus/event_source/devices/uprobe/type")
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    let format = read("/sys/bus/event_source/devices/uprobe/format/retprobe");
    let bit: u32 = format
        .trim()
        .trim_start_matches("config:")
        .parse()
        .map_err(io::Error::other)?;
    let path = std::ffi::CString::new(binary.to_str().expect("UTF-8"))?;
    let attributes = Attributes {
        kind,
        size: size_of::<Attributes>() as u32,
        config: u64::from(on_return) << bit,
        unused: [0; 4],
        _wakeup: 0,
        _breakpoint: 0,
        path: path.as_ptr() as u64,
        offset,
    };
    // SAFETY: the attributes and the path they point to live through the call; every process on processor 0, no group.
    let descriptor = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, -1, 0, -1, 8) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) }.into())
}

#[test]
fn other_tools_probes_are_borne_or_refused() {
    let Some(mut world) = World::get() else { return };
    // Go ends when it moves a stack with a probe on a return, whoever else is there: this is about the agent.
    world.server_flags = vec!["--roomy-stacks".to_owned()];
    world.start_server(CHANCE);
    let file = std::fs::read(&world.program).expect("a binary");
    let offset = golang::find(&file).expect("a place").file_offset;
    let put = |on_return| foreign_probe(&world.program, offset, on_return).expect("a probe");

    // Before the agent: refused, whatever kind it is.
    for on_return in [false, true] {
        let probe = put(on_return);
        let (code, said) = world.refused_at("steer:auto", "agent.sock");
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("another tool's probe"), "{said}");
        drop(probe);
    }
    // One that goes while the agent waits for what its predecessor may have left is no reason.
    world.start_agent("steer:auto", &[]);
    world.wait_until_ready();

    // After it, on the entry: nobody notices.
    let probe = foreign_probe(&world.program, offset, false).expect("a probe");
    let ((), requests) = Load::during(&world, |pass| pass(many()));
    expect_obedience(&mut world);
    assert_eq!(answers(&mut world, "taken") + answers(&mut world, "return_probe"), 0.0);
    eprintln!("{requests} requests with another tool's probe on the entry");
    drop(probe);

    // After it, on the return: the function itself runs, since the kernel writes to the stack behind all programs.
    let probe = foreign_probe(&world.program, offset, true).expect("a probe");
    let mut asked = 0;
    world.wait("the agent holds", |world| {
        if asked < 20 {
            let asking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                Client::connect(&world.pki, world.hub(), world.address()).get("/");
            }));
            assert!(
                asking.is_ok(),
                "request {asked}; the server's log:\n{}",
                world.server_log()
            );
            asked += 1;
        }
        says(world, "on the return of the decider")
    });
    expect_life(&mut world);
    assert!(answers(&mut world, "return_probe") >= 1.0);
    drop(probe);
    expect_obedience(&mut world);
    expect_life(&mut world);
}

#[test]
fn a_probe_that_is_never_reached_is_a_fault_with_a_reason() {
    let Some(mut world) = World::get() else { return };
    world.server_flags = vec!["--ask=false".to_owned()];
    world.start_server(CHANCE);
    world.start_agent("steer:auto", &[]);
    world.wait("the agent answers", |world| world.ask("/v1/status"));
    let mut client = Client::connect(&world.pki, world.hub(), world.address());
    world.wait("the agent holds", |world| {
        for _ in 0..100 {
            client.get("/");
        }
        says(world, "was never reached")
    });
    eprintln!("after {} requests: never reached", client.requests);
    assert_eq!(answers(&mut world, "hits"), 0.0);
}

#[test]
fn an_apiserver_that_is_not_there_yet_is_waited_for_and_a_replaced_file_changes_nothing() {
    let Some(mut world) = World::get() else { return };
    let copy = world.directory.join("server-to-replace");
    std::fs::copy(&world.program, &copy).expect("a copy");
    let newer = world.directory.join("newer");
    std::fs::copy(&world.program, &newer).expect("a copy");
    world.program.clone_from(&copy);
    // Before the apiserver, as at boot.
    world.start_agent(&format!("steer:{}", copy.display()), &[]);
    world.wait("the agent waits", |world| says(world, "no process listens on port"));
    world.start_server(CHANCE);
    let attached = |agent: &Process| agent.log().matches("the probe is on the apiserver").count();
    // What clients ask before nobody counts.
    world.wait("the probe is put", |world| {
        (attached(world.agent.as_ref().expect("an agent")) == 1).then_some(())
    });
    expect_obedience(&mut world);
    // An upgrade replaces the file under the running server: the probe stays where it is.
    std::fs::rename(&newer, &copy).expect("a new file");
    expect_obedience(&mut world);
    assert_eq!(attached(world.agent.as_ref().expect("an agent")), 1);
    // And an agent that starts now finds it by the path it was started from.
    world.agent.take().expect("an agent").kill();
    world.start_agent(&format!("steer:{}", copy.display()), &[]);
    expect_obedience(&mut world);
    expect_life(&mut world);
}
