//! A real kube-apiserver judges what `rebalancer manifest` prints, and what Helm makes of the chart.

use std::{fs, path::Path, process::Command};

use rebalancer_tests::{
    binary, fixture,
    kubectl::{Kubectl, Who},
    process::log_directory,
    skip,
};

use crate::world::World;

#[test]
fn the_apiserver_takes_the_manifests() {
    let Some(world) = World::get() else { return };
    let admin = Who::Certificate(world.pki.pair("admin"));
    let kubectl = Kubectl::new(&world.pki, world.apiserver, &admin).expect("a kubeconfig");
    // A kubelet's static pods have none; the apiserver asks for one of every pod it is given.
    let _ = kubectl.run(&["create", "serviceaccount", "default", "--namespace", "kube-system"]);
    // A dry run makes no namespace for what is in it.
    let _ = kubectl.run(&["create", "namespace", "rebalancer"]);
    let directory = log_directory("manifests").expect("a directory");
    for (name, arguments) in [
        ("daemonset", &["daemonset"][..]),
        ("static-pod", &["static-pod"]),
        ("steer", &["static-pod", "--agent-flag=--shim=steer:auto"]),
        (
            "many-files",
            &[
                "static-pod",
                "--relay-flag=--tls-sni-cert-key=/etc/very/long/path/of/some/certificates/that/is/longer/than/a/label/may/be/x.crt,/k/x.key",
            ],
        ),
    ] {
        let output = Command::new(binary())
            .arg("manifest")
            .args(arguments)
            .output()
            .expect("it starts");
        assert!(
            output.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        judge(&kubectl, &directory, name, &output.stdout);
    }
    match fixture::tool("chart") {
        Err(error) => skip(&format!("the chart is not judged: {error:#}")),
        Ok(helm) => {
            let output = Command::new(helm)
                .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/rebalancer"))
                .args(["rebalancer", "dashboard.enabled=true", "networkPolicy.enabled=true"])
                .arg("networkPolicy.peerCIDRs={10.0.0.0/24}")
                .output()
                .expect("it starts");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            judge(&kubectl, &directory, "chart", &output.stdout);
        }
    }
    fs::remove_dir_all(directory).expect("it is there");
}

/// The apiserver takes it; unknown fields are errors, too.
fn judge(kubectl: &Kubectl, directory: &Path, name: &str, text: &[u8]) {
    let path = directory.join(format!("{name}.yaml"));
    fs::write(&path, text).expect("a file");
    let path = path.display().to_string();
    let answer = kubectl
        .run(&["apply", "--dry-run=server", "--validate=strict", "-f", &path])
        .expect("kubectl runs");
    let said = answer.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(said.contains("rebalancer created"), "{name}: {said}");
}
