//! Protocols are seen wherever the agent and the apiserver run, or it is said at once that they are not.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::{FromRawFd as _, OwnedFd},
    process::Command,
};

use rebalancer_tests::{binary, cgroup::Cgroup, process::wait_for, skip};

use crate::world::{Host, PATIENCE, client_hello, ebpf_or_skip, has_cgroup2, protocols};

/// A cgroup of this test's own; `None`, and a counted skip, where there is no cgroup2.
fn cgroup(name: &str) -> Option<Cgroup> {
    let made = Cgroup::new(name).expect("a cgroup");
    if made.is_none() {
        skip("no cgroup2 is mounted");
    }
    made
}

fn says_hello(host: &mut Host, listener: &TcpListener) {
    let (mut client, mut accepted) = host.connect(host.address(), listener);
    let hello = client_hello(&["h2"]);
    client.write_all(&hello).expect("a hello");
    accepted.read_exact(&mut vec![0; hello.len()]).expect("it arrives");
    host.expect("the offer", |list| protocols(list) == ["offered"]);
    drop((client, accepted));
    host.expect("none", <[_]>::is_empty);
}

#[test]
fn the_program_follows_the_apiserver_into_its_cgroup() {
    if !ebpf_or_skip() {
        return;
    }
    let Some(cgroup) = cgroup("server") else { return };
    let mut host = Host::new("ebpf");
    host.start_agent();
    let reads_at = |host: &Host, place: &str| {
        wait_for(PATIENCE, || {
            let log = host.agent.as_ref().expect("it runs").log();
            log.lines()
                .rfind(|line| line.contains("ClientHellos are read at"))
                .filter(|line| line.contains(place))
                .map(drop)
        })
        .unwrap_or_else(|| panic!("never read at {place}: {}", host.agent.as_ref().expect("it runs").log()));
    };
    // Nobody listens: it is at the root, and the first client of whoever comes is seen.
    reads_at(&host, "the root of all cgroups");
    let listener = cgroup.within(|| host.listen("0.0.0.0")).expect("this process moves");
    says_hello(&mut host, &listener);
    reads_at(&host, "rebalancer-server");
    says_hello(&mut host, &listener);
    // It comes back elsewhere: once it is down, the program waits at the root for whoever comes.
    drop(listener);
    reads_at(&host, "the root of all cgroups");
    let listener = host.listen("0.0.0.0");
    says_hello(&mut host, &listener);
    reads_at(&host, "the root of all cgroups");
    says_hello(&mut host, &listener);
}

/// Whether util-linux and a shell are there to make namespaces with, else a counted skip.
fn can_contain() -> bool {
    let is_there = Command::new("sh")
        .args(["-c", "command -v unshare setpriv mount umount"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !is_there {
        skip("there is no shell with unshare, setpriv and mount (util-linux)");
    }
    is_there
}

/// The agent in a cgroup namespace of its own, as a container has it, with a mount of its own; `more` runs it.
fn contained(cgroup: &Cgroup, more: &str) -> Command {
    let mount = &cgroup.root().display().to_string();
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec unshare --cgroup --mount sh -c 'umount -l {mount} 2>/dev/null; mount -t \
         cgroup2 none {mount} && exec {more} \"$0\" \"$@\"' \"$0\" \"$@\"",
        cgroup.path().display()
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(binary());
    command
}

#[test]
fn in_a_cgroup_namespace_of_its_own_the_hosts_hierarchy_is_found() {
    if !ebpf_or_skip() || !can_contain() {
        return;
    }
    let Some(cgroup) = cgroup("agent") else { return };
    let mut host = Host::new("ebpf");
    host.start_agent_by(contained(&cgroup, ""));
    let listener = host.listen("0.0.0.0");
    says_hello(&mut host, &listener);
    drop(host);
    drop(cgroup);
}

/// A client that says a whole hello is counted all the same, and a warning says why nothing was seen of it.
fn is_blind(host: &mut Host) -> (String, TcpStream, (TcpListener, TcpStream)) {
    let listener = host.listen("0.0.0.0");
    let (mut client, accepted) = host.connect(host.address(), &listener);
    client.write_all(&client_hello(&["h2"])).expect("a hello");
    host.expect("it is counted", |list| protocols(list) == ["unknown"]);
    let warning = wait_for(PATIENCE, || {
        let status = host.ask("/v1/status")?;
        status["warnings"][0].as_str().map(str::to_owned)
    });
    (warning.expect("a warning"), client, (listener, accepted))
}

#[test]
fn where_the_hosts_hierarchy_cannot_be_found_it_is_said_at_once() {
    if !ebpf_or_skip() || !can_contain() {
        return;
    }
    let Some(cgroup) = cgroup("blind") else { return };
    let mut host = Host::new("ebpf");
    // Neither a handle nor the host's first process leads out.
    let alone = "unshare --pid --fork --kill-child --mount-proc setpriv --bounding-set=-dac_read_search";
    host.start_agent_by(contained(&cgroup, alone));
    let (warning, _client, _server) = is_blind(&mut host);
    assert!(
        warning.contains("--cgroup-root") && warning.contains("cgroup namespace"),
        "{warning}"
    );
    let log = host.agent.as_ref().expect("it runs").log();
    assert!(log.contains("which connections speak HTTP/2 is not seen"), "{log}");
    drop(host);
    drop(cgroup);
}

#[test]
fn without_cgroup2_connections_are_counted_and_it_is_said_that_offers_are_not_seen() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    // As where cgroup v1 is all there is: in a machine made so, or where another place is named.
    if has_cgroup2() {
        host.flags = vec!["--cgroup-root=/proc".to_owned()];
    }
    host.start_agent();
    let (warning, client, _server) = is_blind(&mut host);
    assert!(warning.contains("cgroup2"), "{warning}");
    // Once it has lived for a while.
    wait_for(PATIENCE, || (host.figure("/view/0/connections") == 1).then_some(())).expect("what is unknown counts");
    drop(client);
    host.expect("none", <[_]>::is_empty);
}

#[test]
fn without_classification_no_packet_is_looked_at() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.flags = vec!["--classify=off".to_owned()];
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    let (mut client, _accepted) = host.connect(host.address(), &listener);
    client.write_all(&client_hello(&["h2"])).expect("a hello");
    host.expect("it is counted", |list| protocols(list) == ["unknown"]);
    let agent = host.agent.as_ref().expect("it runs").id();
    let links: Vec<String> = fs::read_dir(format!("/proc/{agent}/fdinfo"))
        .expect("its descriptors")
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .filter(|text| text.contains("link_type:\tcgroup"))
        .collect();
    assert_eq!(links, Vec::<String>::new());
}

#[test]
fn an_agent_that_is_killed_leaves_no_program_behind() {
    if !ebpf_or_skip() {
        return;
    }
    let mut host = Host::new("ebpf");
    host.start_agent();
    let listener = host.listen("0.0.0.0");
    says_hello(&mut host, &listener);
    let agent = host.agent.as_mut().expect("it runs");
    let mut programs: Vec<u32> = fs::read_dir(format!("/proc/{}/fdinfo", agent.id()))
        .expect("its descriptors")
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .filter_map(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("prog_id:"))?;
            line.trim().parse().ok()
        })
        .collect();
    programs.sort_unstable();
    programs.dedup();
    assert_eq!(programs.len(), 3, "those that count, list and read ClientHellos");
    assert!(programs.iter().all(|id| is_loaded(*id)));
    agent.kill();
    wait_for(PATIENCE, || (!programs.iter().any(|id| is_loaded(*id))).then_some(())).expect("they go with it");
}

/// Whether the kernel still has the program of that number.
fn is_loaded(id: u32) -> bool {
    /// include/uapi/linux/bpf.h, `enum bpf_cmd`
    const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
    let attributes = [id, 0, 0];
    // SAFETY: the pointer is to the twelve octets that this command takes, which live through the call.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_GET_FD_BY_ID,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    let Ok(descriptor) = i32::try_from(descriptor) else {
        return false;
    };
    if descriptor < 0 {
        return false;
    }
    // SAFETY: the call has just made it, and nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
    true
}
