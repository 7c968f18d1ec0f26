//! The demo: a whole control plane in network namespaces, one apiserver dies and comes back empty, the agents level it.
//!
//! Job: play the scene, measure it from outside the agents, and say what was seen.
//! Must never leave a process, a namespace or a file of sockets behind, also when interrupted.

pub mod cluster;
pub mod report;
pub mod scene;
pub mod screen;

use std::sync::atomic::Ordering::Relaxed;

/// Ctrl-C and SIGTERM end the scene at its next look, so that everything is taken down in order.
///
/// # Errors
///
/// Signals cannot be listened for.
pub fn interrupts() -> anyhow::Result<tokio::runtime::Runtime> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let _inside = runtime.enter();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    runtime.spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        scene::INTERRUPTED.store(true, Relaxed);
    });
    drop(_inside);
    Ok(runtime)
}
