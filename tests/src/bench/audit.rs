//! An apiserver's audit log, read as it grows: who asked what, in the apiserver's own words.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use serde_json::json;

/// The policy's file: what kubelets ask, when it has been answered or a watch has begun, and nothing else.
const POLICY: &str = "audit-policy.json";

/// The log of one apiserver's process.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    /// Octets that were read.
    read: u64,
}

impl Log {
    /// One in `directory`, beside its policy; `name` is a file's that is not there yet.
    ///
    /// # Errors
    ///
    /// The policy cannot be written.
    pub fn new(directory: &Path, name: &str) -> anyhow::Result<Self> {
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{"level": "Metadata", "userGroups": ["system:nodes"]}, {"level": "None"}],
        });
        let file = directory.join(POLICY);
        fs::write(&file, policy.to_string()).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Self {
            path: directory.join(name),
            read: 0,
        })
    }

    /// What the apiserver is started with.
    pub fn flags(&self) -> [String; 2] {
        [
            format!("--audit-policy-file={}", self.path.with_file_name(POLICY).display()),
            format!("--audit-log-path={}", self.path.display()),
        ]
    }

    /// What was written since the last time.
    ///
    /// # Errors
    ///
    /// It cannot be read, or a line is no event.
    pub fn events<T: DeserializeOwned>(&mut self) -> anyhow::Result<Vec<T>> {
        // An apiserver makes it with its first line.
        let Ok(mut file) = File::open(&self.path) else {
            return Ok(Vec::new());
        };
        file.seek(SeekFrom::Start(self.read))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        // A line that is not whole yet is read the next time.
        let whole = text.iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
        self.read += whole as u64;
        let lines = text[..whole]
            .split(|octet| *octet == b'\n')
            .filter(|line| !line.is_empty());
        let event = |line| serde_json::from_slice(line).with_context(|| format!("a line of {}", self.path.display()));
        lines.map(event).collect()
    }
}
