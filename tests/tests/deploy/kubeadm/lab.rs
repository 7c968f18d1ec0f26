//! Three hosts that kubeadm makes a control plane of: each a network, mount, process and host name of its own.
//!
//! Input: programs and image archives. Output: hosts on which commands run as on a node, behind a haproxy.
//! Must never leave anything behind: what processes leave is taken away by `leftovers`, however the test ends.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rebalancer_tests::{
    balancer::{Haproxy, Policy},
    fixture::VERSION,
    netns::{Namespace, Network},
    process::{Process, tail, wait_for},
};

use super::{images::Archives, leftovers::Leftovers};

/// Nodes of the control plane.
pub const NODES: usize = 3;

/// How long a step of kubeadm may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(900);

/// What a node has for itself of the file system, beside its own /etc/hosts.
pub const OWN: [&str; 8] = [
    "/run",
    "/etc/kubernetes",
    "/var/lib/kubelet",
    "/var/lib/etcd",
    "/var/log/pods",
    "/var/log/containers",
    "/usr/libexec/kubernetes",
    "/usr/local/bin",
];

/// The runtime as a node has it, less what a container in a container may not do.
const CONTAINERD: &str = r#"version = 2
root = "DIRECTORY/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10.2"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "DIRECTORY/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"#;

/// Where pods reach the apiservers: the first address of the Services.
const SERVICE: &str = "10.96.0.1";

/// All pods are of the host's network: a network must be there for the node to be ready, and nobody uses it.
const CNI: &str = r#"{"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "loopback"}]}"#;

/// kubelet.service with kubeadm's drop-in: it starts when kubeadm has written its files, and again when it has ended.
const KUBELET: &str = "\
while :; do
  if [ -f /var/lib/kubelet/config.yaml ]; then
    . /var/lib/kubelet/kubeadm-flags.env
    kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \\
      --config=/var/lib/kubelet/config.yaml $KUBELET_KUBEADM_ARGS
  fi
  sleep 0.3
done
";

/// One of the hosts.
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: IpAddr,
    /// Where what it has for itself is.
    pub directory: PathBuf,
    /// Its first process: with it all others end.
    init: Process,
    pid: u32,
    _services: Vec<Process>,
}

/// The control plane and its load balancer.
pub struct Lab {
    /// What is in the hub's network: the load balancer and clients.
    pub network: Network,
    /// The nodes.
    pub hosts: Vec<Host>,
    /// haproxy, as kubeadm's documentation has it.
    pub balancer: Haproxy,
    /// Logs.
    pub directory: PathBuf,
    // The last to go: it waits until everything else has.
    leftovers: Leftovers,
}

impl Lab {
    /// Makes the control plane: `kubeadm init`, and two that join.
    ///
    /// # Errors
    ///
    /// Not root, a program is missing, or kubeadm does not come to its end.
    pub fn start(programs: &Path, archives: &Archives, directory: &Path) -> anyhow::Result<Self> {
        let leftovers = Leftovers::watch(directory)?;
        let network = Network::new(NODES)?;
        let addresses: Vec<SocketAddr> = (0..NODES)
            .map(|index| SocketAddr::new(Network::node_address(index), 6443))
            .collect();
        let front = SocketAddr::new(Network::HUB, 6443);
        let logs = directory.join("logs");
        fs::create_dir_all(&logs)?;
        let balancer = Haproxy::start(
            front,
            "cp",
            &addresses,
            Policy::Roundrobin,
            // As docs/maintenance.md has it.
            "inter 1s weight 100 agent-check agent-inter 1s agent-port 9480",
            network.hub.fd(),
            &logs,
        )?;
        let mut hosts = Vec::with_capacity(NODES);
        for (index, address) in addresses.iter().enumerate() {
            hosts.push(Host::start(
                index,
                address.ip(),
                &network.nodes[index],
                &leftovers,
                programs,
                directory,
            )?);
        }
        let lab = Self {
            network,
            hosts,
            balancer,
            directory: directory.to_owned(),
            leftovers,
        };
        for host in &lab.hosts {
            eprintln!("{}: images", host.name);
            for archive in archives.all() {
                host.done(&format!("ctr --namespace k8s.io images import {}", archive.display()))?;
            }
        }
        lab.init()?;
        for index in 1..NODES {
            lab.join(index)?;
        }
        Ok(lab)
    }

    fn init(&self) -> anyhow::Result<()> {
        let host = &self.hosts[0];
        eprintln!("{}: kubeadm init", host.name);
        let configuration = format!(
            "\
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {{advertiseAddress: {address}, bindPort: 6443}}
nodeRegistration:
  name: {name}
  imagePullPolicy: Never
  taints: []
  kubeletExtraArgs: [{{name: cgroup-root, value: {cgroup}}}]
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: {VERSION}
controlPlaneEndpoint: {front}:6443
networking: {{podSubnet: 10.97.0.0/16, serviceSubnet: 10.96.0.0/16}}
etcd: {{local: {{extraArgs: [{{name: unsafe-no-fsync, value: \"true\"}}]}}}}
dns: {{disabled: true}}
proxy: {{disabled: true}}
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
oomScoreAdj: 0
resolvConf: {directory}/resolv.conf
evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}}
imageGCHighThresholdPercent: 100
",
            address = host.address,
            name = host.name,
            cgroup = self.leftovers.cgroup(&host.name),
            front = Network::HUB,
            directory = host.directory.display(),
        );
        fs::write(host.directory.join("init.yaml"), configuration)?;
        host.done(&format!(
            "kubeadm init --config {}/init.yaml --ignore-preflight-errors=SystemVerification",
            host.directory.display()
        ))?;
        Ok(())
    }

    fn join(&self, index: usize) -> anyhow::Result<()> {
        let (first, host) = (&self.hosts[0], &self.hosts[index]);
        eprintln!("{}: kubeadm join", host.name);
        let from = first.own("/etc/kubernetes").join("pki");
        let to = host.own("/etc/kubernetes").join("pki");
        fs::create_dir_all(to.join("etcd"))?;
        for name in ["ca", "sa", "front-proxy-ca", "etcd/ca"] {
            for ending in ["crt", "key", "pub"] {
                let file = format!("{name}.{ending}");
                if from.join(&file).is_file() {
                    fs::copy(from.join(&file), to.join(&file))?;
                }
            }
        }
        let token = first.done("kubeadm token create")?;
        let configuration = format!(
            "\
apiVersion: kubeadm.k8s.io/v1beta4
kind: JoinConfiguration
discovery:
  bootstrapToken: {{token: {token}, apiServerEndpoint: '{front}:6443', unsafeSkipCAVerification: true}}
controlPlane: {{localAPIEndpoint: {{advertiseAddress: {address}, bindPort: 6443}}}}
nodeRegistration:
  name: {name}
  imagePullPolicy: Never
  taints: []
  kubeletExtraArgs: [{{name: cgroup-root, value: {cgroup}}}]
",
            token = token.trim(),
            front = Network::HUB,
            address = host.address,
            name = host.name,
            cgroup = self.leftovers.cgroup(&host.name),
        );
        fs::write(host.directory.join("join.yaml"), configuration)?;
        host.done(&format!(
            "kubeadm join --config {}/join.yaml --ignore-preflight-errors=SystemVerification",
            host.directory.display()
        ))?;
        Ok(())
    }

    /// Runs a line on the load balancer's host, which has its haproxy's socket where Debian's package puts it.
    ///
    /// # Errors
    ///
    /// It fails.
    pub fn on_balancer(&self, line: &str) -> anyhow::Result<String> {
        let socket = std::path::absolute(self.balancer.socket())?;
        let script = format!(
            "mount -t tmpfs tmpfs /run && mkdir /run/haproxy && ln -s {} /run/haproxy/admin.sock && exec bash -c \"$0\"",
            socket.display()
        );
        let output = Command::new("unshare")
            .args(["--mount", "bash", "-c", &script, line])
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "lb# {line}: {said}");
        Ok(said)
    }

    /// The host of a name.
    pub fn host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| host.name == name)
    }
}

impl Host {
    fn start(
        index: usize,
        address: IpAddr,
        namespace: &Namespace,
        leftovers: &Leftovers,
        programs: &Path,
        lab: &Path,
    ) -> anyhow::Result<Self> {
        let name = format!("cp-{}", index + 1);
        let directory = lab.join(&name);
        let logs = lab.join("logs");
        for own in OWN {
            fs::create_dir_all(directory.join("own").join(&own[1..]))?;
        }
        for made in ["cni", "home"] {
            fs::create_dir_all(directory.join(made))?;
        }
        fs::write(directory.join("cni/10-none.conflist"), CNI)?;
        fs::write(directory.join("resolv.conf"), "nameserver 127.0.0.1\n")?;
        let hosts: String = (0..NODES)
            .map(|index| format!("{} cp-{}\n", Network::node_address(index), index + 1))
            .collect();
        fs::write(directory.join("hosts"), format!("127.0.0.1 localhost\n{hosts}"))?;
        fs::write(
            directory.join("containerd.toml"),
            CONTAINERD.replace("DIRECTORY", &directory.display().to_string()),
        )?;
        fs::write(directory.join("kubelet.sh"), KUBELET)?;
        for entry in fs::read_dir(programs)?.flatten() {
            let to = directory.join("own/usr/local/bin").join(entry.file_name());
            std::os::unix::fs::symlink(entry.path(), to)?;
        }
        leftovers.make_cgroup(&name)?;
        // kubeadm names the node's own address as the one that the default route leaves by.
        namespace.ip(&format!("route add default via {}", Network::HUB))?;
        // What kube-proxy would do for the Service `kubernetes`.
        namespace.run(
            "iptables",
            &format!(
                "-t nat -A OUTPUT -d {SERVICE} -p tcp --dport 443 -j DNAT --to-destination {}:6443",
                Network::HUB
            ),
        )?;

        let mut mounts = String::from("set -e\nmount --make-rshared /\n");
        for own in OWN {
            let from = directory.join("own").join(&own[1..]);
            mounts += &format!("mount --bind {} {own}\n", from.display());
        }
        mounts += &format!(
            "mount --bind {0}/hosts /etc/hosts\nmount --bind {0}/resolv.conf /etc/resolv.conf\nhostname {name}\n",
            directory.display()
        );
        // What kubeadm asks of a machine; here it is of this network alone.
        mounts += "echo 1 > /proc/sys/net/ipv4/ip_forward\n";
        mounts += &format!("touch {}/is-up\nexec sleep infinity\n", directory.display());
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-c", &mounts]);
        let mut init = Process::start(&name, command, Some(namespace.fd()), &logs)?;
        wait_for(Duration::from_secs(60), || {
            let is_up = directory.join("is-up").is_file();
            (is_up || init.is_running().is_err()).then_some(())
        });
        init.is_running()?;
        let pid = child_of(init.id()).with_context(|| format!("{name} has no first process"))?;
        let mut host = Self {
            name,
            address,
            directory,
            init,
            pid,
            _services: Vec::new(),
        };
        let containerd = host.command(&format!(
            "exec containerd --config {}/containerd.toml",
            host.directory.display()
        ));
        let kubelet = host.command(&format!("exec bash {}/kubelet.sh", host.directory.display()));
        let containerd = Process::start(
            &format!("{}-containerd", host.name),
            containerd,
            Some(namespace.fd()),
            &logs,
        )?;
        host._services.push(containerd);
        wait_for(PATIENCE, || {
            host.run("ctr version").ok().filter(|output| output.status.success())
        })
        .with_context(|| format!("containerd of {} does not answer", host.name))?;
        let kubelet = Process::start(&format!("{}-kubelet", host.name), kubelet, Some(namespace.fd()), &logs)?;
        host._services.push(kubelet);
        Ok(host)
    }

    /// How somebody gets a shell on it.
    pub fn way(&self) -> String {
        format!(
            "nsenter --target={} --mount --uts --net --pid bash    # {}",
            self.pid, self.name
        )
    }

    /// Where the test finds what the host has for itself.
    pub fn own(&self, path: &str) -> PathBuf {
        self.directory.join("own").join(path.trim_start_matches('/'))
    }

    /// A line of a shell on this host, in root's home there.
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={}", self.pid))
            .args(["--mount", "--uts", "--net", "--pid", "bash", "-c"])
            .arg(format!("cd {}/home && {line}", self.directory.display()))
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.directory.join("home"));
        command
    }

    /// What a line of a shell came to.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn run(&self, line: &str) -> anyhow::Result<Output> {
        Ok(self.command(line).output()?)
    }

    /// What it printed.
    ///
    /// # Errors
    ///
    /// It ended with something other than 0.
    pub fn done(&self, line: &str) -> anyhow::Result<String> {
        let output = self.run(line)?;
        let text = |octets: &[u8]| String::from_utf8_lossy(octets).into_owned();
        let said = text(&output.stdout);
        ensure!(
            output.status.success(),
            "{}# {line}\n{}\n{}",
            self.name,
            tail(&said),
            tail(&text(&output.stderr))
        );
        Ok(said)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its first process's end is the end of all that run on it.
        self.init.kill();
    }
}

/// The child of a process that has one.
fn child_of(parent: u32) -> Option<u32> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // proc_pid_stat(5): pid, name in parentheses, state, parent.
        let (_, rest) = stat.rsplit_once(") ")?;
        (rest.split(' ').nth(1)?.parse() == Ok(parent)).then_some(pid)
    })
}
