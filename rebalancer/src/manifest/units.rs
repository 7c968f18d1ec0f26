//! systemd units: one for the agent, a template for relays, of which a new one takes over from the one that runs.
//!
//! Must never give a process more than it needs: `systemd-analyze security` judges what is written here.

use std::fmt::Write as _;

use super::Flags;

/// A unit.
#[derive(Clone, Debug)]
pub struct Unit {
    /// The file's name.
    pub name: &'static str,
    /// What is in it.
    pub text: String,
}

/// Where packages put the program.
const PROGRAM: &str = "/usr/bin/rebalancer";

/// Both units, or the agent's alone where there is no relay.
pub fn units(agent: &Flags, relay: Option<&Flags>) -> Vec<Unit> {
    let mut units = vec![Unit {
        name: "rebalancer-agent.service",
        text: self::agent(agent),
    }];
    units.extend(relay.map(|relay| Unit {
        name: "rebalancer-relay@.service",
        text: self::relay(relay),
    }));
    units
}

fn agent(flags: &Flags) -> String {
    let mut text = format!(
        "\
[Unit]
Description=rebalancer agent: moves clients of the local kube-apiserver when the load is uneven
Documentation=man:rebalancer(1)
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={}
# Flags as variables: REBALANCER_SHIM, REBALANCER_PEER, ...
EnvironmentFile=-/etc/rebalancer/agent.env
WatchdogSec=30s
Restart=always
RestartSec=2s
# 2 is a configuration that is wrong: it would be wrong again.
RestartPreventExitStatus=2
",
        command(flags)
    );
    text += HARDENED;
    let capabilities = capabilities(flags);
    let _ = writeln!(text, "CapabilityBoundingSet={capabilities}");
    if !flags.steers() {
        // No other process is looked into.
        text += "ProcSubset=pid\nProtectProc=invisible\n";
    }
    text += "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK\n";
    text += "SystemCallFilter=@system-service\nSystemCallFilter=~@privileged @resources\nSystemCallFilter=bpf\n";
    if flags.steers() {
        // A uprobe is a perf event.
        text += "SystemCallFilter=perf_event_open\n";
    }
    text += "MemoryMax=256M\n";
    writable(&mut text, flags);
    text + INSTALL
}

fn relay(flags: &Flags) -> String {
    let mut text = format!(
        "\
[Unit]
Description=rebalancer relay %i: front door of the local kube-apiserver
Documentation=man:rebalancer(1)
After=network-online.target
Wants=network-online.target

[Service]
# A new instance takes over from the one that runs, which drains and ends by itself:
#   systemctl enable --now rebalancer-relay@2 && systemctl disable rebalancer-relay@1
Type=notify
ExecStart={}
# Flags as variables: REBALANCER_UPSTREAM, REBALANCER_TLS_CERT, ...
EnvironmentFile=-/etc/rebalancer/relay.env
WatchdogSec=30s
Restart=on-failure
RestartSec=1s
# Connections may last as long as --drain-deadline after it was told to end.
KillMode=mixed
TimeoutStopSec=71min
LimitNOFILE=131072
",
        command(flags)
    );
    text += HARDENED;
    text += "CapabilityBoundingSet=\n";
    // netlink: whether the apiserver's listening socket is another one than before.
    text += "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK\n";
    text += "SystemCallFilter=@system-service\nSystemCallFilter=~@privileged @resources\n";
    writable(&mut text, flags);
    text + INSTALL
}

/// What neither needs.
const HARDENED: &str = "\
RuntimeDirectory=rebalancer
RuntimeDirectoryMode=0700
# The other one's sockets are there too.
RuntimeDirectoryPreserve=yes
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
PrivateDevices=yes
PrivateMounts=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
";

const INSTALL: &str = "
[Install]
WantedBy=multi-user.target
";

fn command(flags: &Flags) -> String {
    let mut line = format!("{PROGRAM} {}", flags.part().name());
    for word in flags.words() {
        line.push(' ');
        line += &quoted(word);
    }
    line
}

/// A word as systemd reads it back (systemd.service(5), "Command lines"): `%` and `$` stand for themselves.
fn quoted(word: &str) -> String {
    let plain = word.replace('%', "%%").replace('$', "$$");
    let is_plain = plain
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "-_=/.,:[]@%$+".contains(c));
    if is_plain && !plain.is_empty() {
        plain
    } else {
        format!("\"{}\"", plain.replace('\\', "\\\\").replace('"', "\\\""))
    }
}

fn capabilities(flags: &Flags) -> String {
    let names: Vec<_> = flags
        .capabilities()
        .into_iter()
        .map(|name| format!("CAP_{name}"))
        .collect();
    names.join(" ")
}

/// Directories that are written besides the runtime directory.
fn writable(text: &mut String, flags: &Flags) {
    let written = flags.mounts().iter().skip(1).filter(|mount| mount.written);
    for mount in written {
        let _ = writeln!(text, "ReadWritePaths={}", mount.path.display());
    }
}
