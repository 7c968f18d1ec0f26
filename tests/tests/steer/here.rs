//! What needs no VM: finding the place in binaries of every Go release, and how this machine's kernel is refused.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use rebalancer_core::binary::golang::{self, Architecture, FUNCTION, RequestLayout};
use rebalancer_tests::{
    fixture::{Fixture, goaway_server},
    skip,
};

use crate::{
    together::foreign_probe,
    world::{World, feature},
};

/// The release on this machine, those whose function tables differ, and the first and last that are known.
const RELEASES: [&str; 6] = ["local", "go1.18.10", "go1.20.14", "go1.21.13", "go1.25.5", "go1.27.1"];

/// Those between them, by `REBALANCER_LONG`.
const OTHER_RELEASES: [&str; 5] = ["go1.19.13", "go1.22.12", "go1.23.12", "go1.24.11", "go1.26.0"];

/// Go as that release, without C.
fn go(release: &str) -> Command {
    let mut command = Command::new("go");
    command
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("go/decider"))
        .env("GOTOOLCHAIN", release)
        .env("CGO_ENABLED", "0");
    command
}

/// What a command prints; `None`, and a counted skip, when it fails.
fn output(what: &str, command: &mut Command) -> Option<String> {
    let failed = |why: &str| {
        skip(&format!("{what} cannot be had: {why}"));
        None
    };
    match command.output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => failed(
            String::from_utf8_lossy(&output.stderr)
                .lines()
                .last()
                .unwrap_or_default(),
        ),
        Err(error) => failed(&error.to_string()),
    }
}

/// The address Go's own symbol table gives the function.
fn address(binary: &Path) -> u64 {
    let symbols = Command::new("go")
        .args(["tool", "nm"])
        .arg(binary)
        .output()
        .expect("go runs");
    let symbols = String::from_utf8_lossy(&symbols.stdout).into_owned();
    // C's linker makes it a local symbol.
    let is_it = |line: &&str| {
        ["T", "t"]
            .iter()
            .any(|kind| line.ends_with(&format!(" {kind} {FUNCTION}")))
    };
    let line = symbols.lines().find(is_it);
    let address = line.and_then(|line| line.split_whitespace().next());
    u64::from_str_radix(address.expect("a symbol"), 16).expect("hexadecimal")
}

fn found(binary: &Path) -> golang::AttachPoint {
    let bytes = fs::read(binary).expect("a binary");
    golang::find(&bytes).unwrap_or_else(|refusal| panic!("{}: {refusal}", binary.display()))
}

#[test]
fn another_tools_probe_is_not_taken_for_a_part_of_the_binary() {
    let server = match goaway_server() {
        Ok(server) => server,
        Err(missing) => return skip(&missing.to_string()),
    };
    // Of every process that maps the file for itself, the one that looks into it included.
    let _probe = match foreign_probe(&server, found(&server).file_offset, false) {
        Ok(probe) => probe,
        Err(why) => return skip(&format!("no probe can be put here: {why}")),
    };
    let read = feature(
        "apiserver-binary",
        &[&format!("--apiserver-binary={}", server.display())],
    );
    assert_eq!(read["ok"], true, "{read}");
}

#[test]
fn the_place_is_found_in_binaries_of_every_release_stripped_or_not() {
    let directory = tempfile::tempdir().expect("a directory");
    for release in RELEASES {
        let Some(version) = output(release, go(release).args(["env", "GOVERSION"])) else {
            continue;
        };
        for (name, architecture) in [("amd64", Architecture::X86_64), ("arm64", Architecture::Aarch64)] {
            for mode in ["exe", "pie"] {
                let build = |flags: &str, to: &str| -> PathBuf {
                    let path = directory.path().join(format!("{release}-{name}-{mode}-{to}"));
                    let built = go(release)
                        .env("GOARCH", name)
                        .args(["build", "-trimpath", "-buildmode", mode, "-ldflags", flags, "-o"])
                        .arg(&path)
                        .output()
                        .expect("go runs");
                    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
                    path
                };
                let (whole, stripped) = (build("", "whole"), build("-s -w", "stripped"));
                let expected = address(&whole);
                for binary in [&whole, &stripped] {
                    let point = found(binary);
                    assert_eq!(point.address, expected, "{}", binary.display());
                    assert_eq!(point.architecture, architecture);
                    assert_eq!(point.build.version.text, version.trim());
                }
                eprintln!("{} {name} {mode}: {expected:#x}, stripped or not", version.trim());
            }
        }
    }
}

#[test]
fn the_place_is_found_where_cs_linker_laid_the_binary_out() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("external");
    let flags = [
        "build",
        "-trimpath",
        "-buildmode=pie",
        "-ldflags=-linkmode=external",
        "-o",
    ];
    let mut build = go("local");
    build.env("CGO_ENABLED", "1").args(flags).arg(&path);
    if output("a binary linked by C's linker", &mut build).is_none() {
        return;
    }
    let expected = address(&path);
    assert_eq!(found(&path).address, expected);
    let mut strip = Command::new("strip");
    if output("`strip`", strip.arg(&path)).is_some() {
        assert_eq!(found(&path).address, expected, "after `strip`");
    }
}

#[test]
fn a_binary_that_a_profile_guided_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    // An empty profile changes nothing and is said all the same; what a real one changes depends on it.
    let profile = directory.path().join("default.pgo");
    fs::write(&profile, "").expect("a file");
    let path = directory.path().join("guided");
    let mut build = go("local");
    build.args(["build", "-trimpath", "-ldflags=-s -w"]);
    build.arg(format!("-pgo={}", profile.display())).arg("-o").arg(&path);
    if output("a build with a profile", &mut build).is_none() {
        return;
    }
    let refusal = golang::find(&fs::read(&path).expect("a binary")).expect_err("a refusal");
    assert!(refusal.to_string().contains("built with a profile (-pgo="), "{refusal}");
}

#[test]
fn damage_to_a_real_binary_leads_nowhere_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("binary");
    let mut build = go("local");
    if output(
        "Go",
        build.args(["build", "-trimpath", "-ldflags=-s -w", "-o"]).arg(&path),
    )
    .is_none()
    {
        return;
    }
    let whole = fs::read(&path).expect("a binary");
    let place = golang::find(&whole).expect("a place");
    let mut state = 1_u64;
    let mut random = |below: usize| {
        // Knuth's MMIX.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut refused = 0;
    for round in 0..400 {
        let mut bytes = whole.clone();
        // Headers are few octets, and the most telling ones.
        let within = if round % 2 == 0 { bytes.len() } else { 4096 };
        for _ in 0..16 {
            bytes[random(within)] = random(256) as u8;
        }
        if round % 8 == 0 {
            bytes.truncate(random(whole.len()));
        }
        match golang::find(&bytes) {
            Ok(found) => assert!(
                bytes[found.file_offset as usize..].starts_with(&whole[place.file_offset as usize..][..4]),
                "a place without Go's stack check"
            ),
            Err(_) => refused += 1,
        }
    }
    eprintln!("400 damaged binaries: {refused} refused");
    assert!(refused > 50, "only {refused} refused: the damage did nothing");
}

#[test]
fn each_releases_compiler_lays_the_request_out_as_the_probe_reads_it() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("go.mod"), "module layout\n\ngo 1.18\n").expect("a file");
    let source = directory.path().join("layout.go");
    let compile = |release: &str, architecture: &str, proto: u32, remote_address: u32| {
        // The length of an array is a part of its type: nothing is compiled where a member lies elsewhere, or is no text.
        let text = format!(
            "package layout\n\nimport (\n\t\"net/http\"\n\t\"unsafe\"\n)\n\nvar request http.Request\n\n\
             var _ [unsafe.Offsetof(request.Proto)]struct{{}} = [{proto}]struct{{}}{{}}\n\
             var _ [unsafe.Offsetof(request.RemoteAddr)]struct{{}} = [{remote_address}]struct{{}}{{}}\n\
             var _, _ *string = &request.Proto, &request.RemoteAddr\n"
        );
        fs::write(&source, text).expect("a file");
        go(release)
            .current_dir(directory.path())
            .env("GOARCH", architecture)
            .args(["build", "-trimpath", "."])
            .output()
            .expect("go runs")
    };
    let RequestLayout { proto, remote_address } = golang::LAYOUT;
    let is_long = env::var_os("REBALANCER_LONG").is_some();
    let further: &[&str] = if is_long { &OTHER_RELEASES } else { &[] };
    for release in RELEASES.iter().chain(further) {
        let Some(version) = output(release, go(release).args(["env", "GOVERSION"])) else {
            continue;
        };
        // Each processor's standard library takes a minute of compiling; both have words of eight octets.
        let architectures: &[&str] = if is_long || *release == RELEASES[0] {
            &["amd64", "arm64"]
        } else {
            &["amd64"]
        };
        for architecture in architectures {
            let compiled = compile(release, architecture, proto, remote_address);
            let said = String::from_utf8_lossy(&compiled.stderr);
            assert!(compiled.status.success(), "{} {architecture}: {said}", version.trim());
            if *release != RELEASES[0] {
                continue;
            }
            for (proto, remote_address) in [(proto + 8, remote_address), (proto, remote_address - 16)] {
                let refused = compile(release, architecture, proto, remote_address);
                let said = String::from_utf8_lossy(&refused.stderr);
                assert!(said.contains("cannot use"), "it would have seen another layout: {said}");
            }
        }
        eprintln!(
            "{}: r.Proto at {proto:#x}, r.RemoteAddr at {remote_address:#x}",
            version.trim()
        );
    }
}

#[test]
fn system_info_says_what_it_finds_in_a_binary() {
    let found = feature("apiserver-binary", &["--apiserver-binary=/proc/self/exe"]);
    assert_eq!(found["ok"], false);
    assert!(
        found["why"]
            .as_str()
            .is_some_and(|why| why.contains("no build information of Go")),
        "{found}"
    );
    let Some(fixture) = Fixture::at_hand() else {
        skip("there is no kube-apiserver at hand: `cargo xtask demo --apiserver real` builds one");
        return;
    };
    let binary = format!("--apiserver-binary={}", fixture.apiserver.display());
    let found = feature("apiserver-binary", &[&binary]);
    assert_eq!(found["ok"], true, "{found}");
    assert!(
        found["found"]
            .as_str()
            .is_some_and(|found| found.contains("k8s.io/apiserver v")),
        "{found}"
    );
    eprintln!("{}: {}", fixture.apiserver.display(), found["found"]);
    let etcd = format!("--apiserver-binary={}", fixture.etcd.display());
    let found = feature("apiserver-binary", &[&etcd]);
    assert!(
        found["why"]
            .as_str()
            .is_some_and(|why| why.contains("no goaway filter")),
        "{found}"
    );
}

#[test]
fn a_kernel_that_refuses_is_said_so_at_the_start() {
    let kernel = feature("steer-kernel", &[]);
    if kernel["ok"] == true {
        skip("this machine's kernel takes the probe: its refusal cannot be seen here");
        return;
    }
    let world = World::with("/nonexistent".into());
    let (code, said) = world.refused("steer:auto");
    assert_eq!(code, Some(2), "{said}");
    let paragraph = said.lines().last().unwrap_or_default();
    assert!(
        paragraph.starts_with("rebalancer: --shim steer:auto cannot be used: "),
        "{said}"
    );
    for part in [
        "the kernel refuses",
        "6.18",
        "rebalancer relay",
        "--shim relay:unix:PATH",
    ] {
        assert!(paragraph.contains(part), "`{part}` is not in: {paragraph}");
    }
    eprintln!("{paragraph}");
}
