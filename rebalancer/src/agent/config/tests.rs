//! What flags, environment and file come to, and how each fault is answered.

use rebalancer_core::policy::GoawayRate;

use super::*;

fn configured(file: &str, flags: Raw) -> anyhow::Result<Config> {
    flags.over(from_yaml(file)?).checked()
}

fn message(file: &str) -> String {
    format!("{:#}", configured(file, Raw::default()).expect_err("a fault"))
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let flags = Raw {
        skew_threshold: Some(0.3),
        ..Raw::default()
    };
    let file = "version: 1\nnode-name: a\nskew-threshold: 0.2\nskew-target: 0.15\ninterval: 2s\nshim: relay:unix:/r\n";
    let config = configured(file, flags).expect("a configuration");
    assert_eq!(config.policy.skew_threshold, 0.3);
    assert_eq!(config.policy.skew_target, 0.15);
    assert_eq!(config.policy.interval, Duration::from_secs(2));
    assert_eq!(config.policy.goaway_rate, GoawayRate::Auto);
    assert_eq!(config.shim, Shim::Relay(SocketPath("/r".into())));
}

#[test]
fn each_fault_names_key_value_and_what_is_allowed() {
    for (file, parts) in [
        ("skew-treshold: 0.2", &["skew-treshold", "skew-threshold"][..]),
        ("skew-threshold: 20", &["--skew-threshold", "20", "at most 10"]),
        (
            "skew-threshold: 0.1\nskew-target: 0.2",
            &["--skew-target 0.2", "--skew-threshold 0.1"],
        ),
        ("shim: relay", &["relay:unix:PATH"]),
        ("interval: 5", &["5", "30s"]),
        ("apiserver-port: 0", &["--apiserver-port", "1 to 65535"]),
        ("apiserver-port: 70000", &["apiserver-port", "70000"]),
        ("peer: [b]", &["NAME=https://HOST:PORT"]),
        ("peer: ['b=https://10.0.0.1:1']", &["--peer-cert"]),
        (
            "peer: ['b=https://10.0.0.1:1', 'b=https://10.0.0.2:1']",
            &["--peer names b twice"],
        ),
        ("weight: requests", &["--weight", "--shim is none"]),
        (
            "weight: streams\nshim: steer:auto",
            &["--weight streams", "--shim steer"],
        ),
        ("intercept: true", &["--intercept", "--shim relay:unix:PATH"]),
        (
            "peers: kubernetes\npeer: ['b=https://10.0.0.1:1']",
            &["--peer", "--peers kubernetes"],
        ),
        ("peers: kubernetes\nlease-namespace: A", &["--lease-namespace A"]),
        ("kubeconfig: /k", &["--kubeconfig", "--peers kubernetes"]),
        ("settle: 0s", &["--settle is 0s", "1s to 1h"]),
        ("goaway-rate: 1.0e-20", &["--goaway-rate", "0.01 to 10000"]),
        ("exclude-user-agent: ['']", &["--exclude-user-agent is empty"]),
        ("exclude-cidr: [10.0.0.0/99]", &["10.0.0.0/99"]),
    ] {
        let said = message(&format!("version: 1\nnode-name: a\n{file}\n"));
        for part in parts {
            assert!(
                said.contains(part),
                "`{file}` is answered by `{said}`, which does not name `{part}`"
            );
        }
    }
}

#[test]
fn a_node_whose_name_no_lease_can_have_is_refused() {
    let flags = Raw {
        node_name: Some("CP_1".to_owned()),
        ..Raw::default()
    };
    let said = configured("version: 1\npeers: kubernetes\n", flags).expect_err("a fault");
    let said = format!("{said:#}");
    assert!(
        said.contains("--node-name CP_1") && said.contains("kubectl get nodes"),
        "{said}"
    );
}

#[test]
fn who_cannot_ask_kubernetes_says_so_by_the_flag() {
    can_ask_kubernetes(true).expect("it can");
    let said = can_ask_kubernetes(false).expect_err("it cannot").to_string();
    for part in ["--peers kubernetes", "feature `kubernetes`", "--version", "--peer"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn a_user_is_a_name_with_or_without_commas() {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        raw: Raw,
    }
    let name = "CN=Jane Doe,OU=Platform,DC=example,DC=test";
    let flags = [
        "agent",
        "--exclude-user",
        name,
        "--exclude-user=admin",
        "--exclude-user-agent=a (b, c)",
    ];
    let line = <Line as clap::Parser>::try_parse_from(flags).expect("a command line");
    assert_eq!(line.raw.exclude_user, [name, "admin"]);
    assert_eq!(line.raw.exclude_user_agent, ["a (b, c)"]);
}

#[test]
fn peers_are_named_addresses() {
    let peer: PeerAddress = "b=https://[2001:db8::1]:9443".parse().expect("a peer");
    assert_eq!((peer.host.as_str(), peer.port), ("2001:db8::1", 9443));
    assert!("b=http://10.0.0.1:9443".parse::<PeerAddress>().is_err());
    assert!("=https://10.0.0.1:9443".parse::<PeerAddress>().is_err());
    assert!("b=https://10.0.0.1".parse::<PeerAddress>().is_err());
}
