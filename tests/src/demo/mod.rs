//! The demo: a whole control plane in network namespaces, one apiserver dies and comes back empty, the agents level it.
//!
//! Job: play the scene, measure it from outside the agents, and say what was seen.
//! Must never leave a process, a namespace or a file of sockets behind, also when interrupted.

pub mod cluster;
pub mod report;
pub mod scene;
pub mod screen;
