//! What the benchmarks measure with: processors, processes, load, peers, and the runs themselves.
//!
//! Output: figures. Must never compare figures of different runs.

pub mod abuse;
pub mod audit;
pub mod bpf;
pub mod compare;
pub mod counts;
pub mod crowd;
pub mod flood;
pub mod floor;
pub mod fronts;
pub mod kernel;
pub mod kubelets;
pub mod kubemark;
pub mod load;
pub mod machine;
pub mod peers;
pub mod planner;
pub mod reconcile;
pub mod relay;
pub mod report;
pub mod scale;
pub mod steer;
