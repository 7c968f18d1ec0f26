//! What is refused, and how it is said: exit code 2, one paragraph with the reason and what to do.

use std::{net::TcpListener, thread};

use rebalancer_tests::process::Process;

use crate::world::{PORT, World};

/// Each refusal names the way that always works.
fn expect_refusal(world: &World, shim: &str, parts: &[&str]) {
    let (code, said) = world.refused(shim);
    assert_eq!(code, Some(2), "{said}");
    let paragraph = said.lines().last().unwrap_or_default();
    assert!(
        paragraph.starts_with(&format!("rebalancer: --shim {shim} cannot be used: ")),
        "{said}"
    );
    for part in parts.iter().chain(&["rebalancer relay", "--shim relay:unix:PATH"]) {
        assert!(paragraph.contains(part), "`{part}` is not in: {paragraph}");
    }
    eprintln!("{paragraph}");
}

#[test]
fn what_is_not_certain_is_refused() {
    let Some(mut world) = World::get() else { return };
    // Something else listens there: this test.
    let node = world.node().clone();
    let listener = thread::spawn(move || {
        node.enter().expect("its own namespace");
        TcpListener::bind(("0.0.0.0", PORT)).expect("the port is free")
    });
    let listener = listener.join().expect("the thread ends well");
    expect_refusal(&world, "steer:auto", &["no build information of Go"]);
    let program = world.program.display().to_string();
    expect_refusal(&world, &format!("steer:{program}"), &[&program, "there is process"]);
    drop(listener);

    world.start_server("0");
    expect_refusal(
        &world,
        "steer:auto",
        &["--goaway-chance is 0", "--goaway-chance=0.000001"],
    );
    world.server = None;

    // Two servers, each on an address of its own.
    world.start_server_on(world.address(), "0.001");
    let second = world.server_command("127.0.0.2:6443", "0.001");
    let mut second = Process::start("second", second, Some(world.node().fd()), &world.directory).expect("a process");
    let listens = |world: &World| world.refused("steer:auto").1.contains("more than one process");
    world.wait("both listen", |world| listens(world).then_some(()));
    let each = format!("process {} running {program}", second.id());
    expect_refusal(
        &world,
        "steer:auto",
        &["more than one process", &each, "--shim steer:PATH"],
    );
    second.kill();
}
