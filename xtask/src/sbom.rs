//! The list of what is in the program, as CycloneDX 1.5 (cyclonedx.org), from what Cargo resolved.
//!
//! Input: `cargo metadata` and Cargo.lock of the workspace and of the kernel programs. Output: JSON, the same octets each
//! time. Must never list what only builds or tests: it is not in the program.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::run::{cargo, root};

/// The list for a processor's program, of a version and commit.
///
/// # Errors
///
/// Cargo does not say what is in it.
pub fn sbom(triple: &str, version: &str, commit: &str) -> anyhow::Result<Value> {
    let mut components = BTreeMap::new();
    let mut dependencies = BTreeMap::new();
    let user = Tree::read(&root().join("Cargo.toml"), "rebalancer", Some(triple))?;
    let kernel = Tree::read(&root().join("rebalancer-ebpf/Cargo.toml"), "rebalancer-ebpf", None)?;
    user.add(&mut components, &mut dependencies)?;
    kernel.add(&mut components, &mut dependencies)?;
    // The kernel programs are in the program.
    dependencies
        .entry(user.top.clone())
        .or_insert_with(BTreeSet::new)
        .insert(kernel.top.clone());
    let program = components
        .remove(&user.top)
        .context("the program is not in its own list")?;
    let dependencies: Vec<Value> = dependencies
        .into_iter()
        .map(|(of, on)| json!({"ref": of, "dependsOn": on}))
        .collect();
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": program,
            "properties": [
                {"name": "rebalancer:version", "value": version},
                {"name": "rebalancer:commit", "value": commit},
                {"name": "rebalancer:target", "value": triple},
            ],
        },
        "components": components.into_values().collect::<Vec<_>>(),
        "dependencies": dependencies,
    }))
}

/// What Cargo resolved for one workspace.
struct Tree {
    metadata: Value,
    /// The reference of the package that all of it is for.
    top: String,
    /// By name and version, SHA-256 of what the registry served.
    checksums: BTreeMap<(String, String), String>,
}

impl Tree {
    fn read(manifest: &Path, top: &str, triple: Option<&str>) -> anyhow::Result<Self> {
        let mut command = cargo(["metadata", "--format-version", "1", "--locked", "--manifest-path"]);
        command.arg(manifest);
        if let Some(triple) = triple {
            command.args(["--filter-platform", triple]);
        }
        let output = command.output().context("cannot start cargo")?;
        anyhow::ensure!(
            output.status.success(),
            "`cargo metadata` failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: Value = serde_json::from_slice(&output.stdout).context("`cargo metadata` said no JSON")?;
        let lock = manifest.with_file_name("Cargo.lock");
        let lock = fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
        let package = packages(&metadata)
            .find(|package| package["name"] == top)
            .with_context(|| format!("there is no package {top}"))?;
        Ok(Self {
            top: reference(package),
            checksums: checksums(&lock),
            metadata,
        })
    }

    /// Adds everything that the top is linked with.
    fn add(
        &self,
        components: &mut BTreeMap<String, Value>,
        dependencies: &mut BTreeMap<String, BTreeSet<String>>,
    ) -> anyhow::Result<()> {
        let by_id: BTreeMap<&str, &Value> = packages(&self.metadata)
            .filter_map(|package| Some((package["id"].as_str()?, package)))
            .collect();
        let nodes: BTreeMap<&str, &Value> = list(&self.metadata["resolve"], "nodes")
            .filter_map(|node| Some((node["id"].as_str()?, node)))
            .collect();
        let first = by_id.iter().find(|(_, package)| reference(package) == self.top);
        let mut waiting = vec![*first.context("the top has no id")?.0];
        while let Some(id) = waiting.pop() {
            let package = by_id.get(id).with_context(|| format!("no package {id}"))?;
            let name = reference(package);
            if components.insert(name.clone(), self.component(package)).is_some() && dependencies.contains_key(&name) {
                continue;
            }
            let linked: Vec<&str> = list(nodes.get(id).with_context(|| format!("no node {id}"))?, "deps")
                .filter(|dependency| list(dependency, "dep_kinds").any(|kind| kind["kind"].is_null()))
                .filter_map(|dependency| dependency["pkg"].as_str())
                // What runs in the compiler is not in the program.
                .filter(|id| !by_id.get(id).is_some_and(|package| is_macro(package)))
                .collect();
            let on = linked
                .iter()
                .filter_map(|id| by_id.get(id))
                .map(|package| reference(package));
            dependencies.insert(name, on.collect());
            waiting.extend(linked);
        }
        Ok(())
    }

    fn component(&self, package: &Value) -> Value {
        let text = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
        let (name, version) = (text("name"), text("version"));
        let mut component = json!({
            "type": if reference(package) == self.top { "application" } else { "library" },
            "bom-ref": reference(package),
            "name": name,
            "version": version,
            "purl": reference(package),
        });
        // `/` is Cargo's older word for OR.
        let license = text("license").replace('/', " OR ").replace("  ", " ");
        if !license.is_empty() {
            component["licenses"] = json!([{"expression": license}]);
        }
        if let Some(checksum) = self.checksums.get(&(name, version)) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        }
        component
    }
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    list(metadata, "packages")
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

fn is_macro(package: &Value) -> bool {
    list(package, "targets").any(|target| list(target, "kind").any(|kind| kind == "proc-macro"))
}

/// A package's purl, which is its reference too.
fn reference(package: &Value) -> String {
    let text = |key: &str| package[key].as_str().unwrap_or_default();
    format!("pkg:cargo/{}@{}", text("name"), text("version").replace('+', "%2B"))
}

/// The checksums of a Cargo.lock.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let value = |part: &str, key: &str| {
        let line = part
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""));
        line.map(|line| line.trim_end_matches('"').to_owned())
    };
    lock.split("[[package]]")
        .filter_map(|part| {
            Some((
                (value(part, "name")?, value(part, "version")?),
                value(part, "checksum")?,
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_is_listed_once_and_nothing_else() {
        let made = sbom("x86_64-unknown-linux-gnu", "0", "c").expect("a list");
        assert_eq!(
            made,
            sbom("x86_64-unknown-linux-gnu", "0", "c").expect("a list"),
            "the same each time"
        );
        assert_eq!(made["metadata"]["component"]["name"], "rebalancer");
        let names: Vec<&str> = list(&made, "components")
            .filter_map(|one| one["name"].as_str())
            .collect();
        for there in [
            "rebalancer-core",
            "rustls",
            "aws-lc-sys",
            "tokio",
            "aya",
            "rebalancer-ebpf",
            "aya-ebpf",
        ] {
            assert!(names.contains(&there), "{there} in {names:?}");
        }
        // Macros, builders and what tests stand on.
        for not in [
            "serde_derive",
            "cc",
            "proptest",
            "rebalancer-tests",
            "xtask",
            "windows-sys",
        ] {
            assert!(!names.contains(&not), "{not}");
        }
        let known: BTreeSet<&str> = list(&made, "components")
            .chain([&made["metadata"]["component"]])
            .filter_map(|one| one["bom-ref"].as_str())
            .collect();
        assert_eq!(known.len(), names.len() + 1);
        for dependency in list(&made, "dependencies") {
            assert!(
                known.contains(dependency["ref"].as_str().expect("a name")),
                "{dependency}"
            );
            for on in list(dependency, "dependsOn") {
                assert!(known.contains(on.as_str().expect("a name")), "{dependency}");
            }
        }
        for component in list(&made, "components") {
            let ours = component["name"].as_str().expect("a name").starts_with("rebalancer");
            assert!(component["licenses"].is_array(), "{component}");
            assert_eq!(component["hashes"].is_array(), !ours, "{component}");
        }
    }
}
