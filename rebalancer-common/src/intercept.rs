//! What the program that steers new connections is told.

/// What to steer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steered {
    /// The apiserver's port, host order.
    pub port: u32,
    /// Index of the loopback interface.
    pub loopback: u32,
}
