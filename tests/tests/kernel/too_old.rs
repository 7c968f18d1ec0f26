//! A kernel that is too old for the programs, and one that is not: each is told from the other by trying.

use rebalancer::kernel::OLDEST;

use crate::world::features;

/// The running kernel's major and minor number.
fn release() -> (u32, u32) {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
    let mut numbers = text
        .split(['.', '-'])
        .map(|part| part.trim().parse().expect("a number"));
    (numbers.next().expect("a major"), numbers.next().expect("a minor"))
}

#[test]
fn a_kernel_that_is_too_old_is_refused_by_name_and_its_socket_list_works() {
    let features = features();
    let sockdiag = &features["source-sockdiag"];
    assert_eq!(sockdiag["ok"], true, "{sockdiag}");
    let ebpf = &features["source-ebpf"];
    let why = ebpf["why"].as_str().unwrap_or_default();
    if release() < OLDEST {
        assert_eq!(ebpf["ok"], false, "{ebpf}");
        assert!(
            why.contains("by itself lacks") && why.contains("or later has it"),
            "{why}"
        );
        eprintln!("{why}");
    } else {
        assert!(!why.contains("by itself lacks"), "a reason that is none: {why}");
    }
}
