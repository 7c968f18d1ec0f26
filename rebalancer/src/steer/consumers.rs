//! Where the running kernel keeps who else has a probe at a place.

use std::fs;

use rebalancer_common::steer::Consumers;
use rebalancer_core::binary::btf::{Btf, BtfError};

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// The members' offsets, from the kernel's type information; why not, where it has none or other members.
pub fn offsets() -> Result<Consumers, String> {
    let blob = fs::read(BTF).map_err(|error| format!("{BTF}: {error}"))?;
    let found = || -> Result<Consumers, BtfError> {
        let btf = Btf::parse(&blob)?;
        Ok(Consumers {
            known: 1,
            task_utask: btf.offset("task_struct", "utask")?,
            utask_auprobe: btf.offset("uprobe_task", "auprobe")?,
            uprobe_arch: btf.offset("uprobe", "arch")?,
            uprobe_consumers: btf.offset("uprobe", "consumers")?,
            consumer_node: btf.offset("uprobe_consumer", "cons_node")?,
            consumer_ret_handler: btf.offset("uprobe_consumer", "ret_handler")?,
            padding: 0,
        })
    };
    found().map_err(|error| error.to_string())
}
