//! What stands in a program that was built without cargo's feature `kubernetes`: a refusal, in one sentence.

use std::{path::Path, sync::Arc};

use anyhow::bail;

use super::{ABSENT, FlowControl, Parts};

/// The way to the API: there is none.
#[derive(Clone)]
pub enum Access {}

/// Refuses; configuration does so before.
///
/// # Errors
///
/// Always.
pub async fn start(_: Parts) -> anyhow::Result<Access> {
    bail!(ABSENT)
}

/// The URL the credentials would name.
///
/// # Errors
///
/// Always.
pub async fn cluster_url(_: Option<&Path>) -> anyhow::Result<http::Uri> {
    bail!(ABSENT)
}

/// Reads nothing.
#[derive(Clone, Default)]
pub struct FlowControlReader;

impl FlowControlReader {
    /// There is no way in.
    pub fn open(&self, access: Access) {
        match access {}
    }

    /// Nothing.
    ///
    /// # Errors
    ///
    /// Always.
    pub async fn read(&self) -> Result<Arc<FlowControl>, String> {
        Err(ABSENT.to_owned())
    }
}

impl FlowControl {
    /// From what kubectl printed: its objects' types are the API's.
    ///
    /// # Errors
    ///
    /// Always.
    pub fn from_kubectl(_: &str) -> Result<Self, String> {
        Err(ABSENT.to_owned())
    }
}
