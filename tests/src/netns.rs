//! Network namespaces without names: they live as long as somebody holds them, and leave nothing behind.
//!
//! Job: one namespace a host, joined by a bridge in a namespace of its own.
//! Must never change the namespace this process started in.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    sync::Arc,
    thread,
};

use anyhow::{Context as _, bail};

/// A namespace, held open.
#[derive(Clone, Debug)]
pub struct Namespace {
    held: Arc<OwnedFd>,
}

impl Namespace {
    /// A new one, with its loopback up.
    ///
    /// # Errors
    ///
    /// Not root, or no `ip` (iproute2).
    pub fn new() -> anyhow::Result<Self> {
        let made = thread::spawn(|| -> anyhow::Result<OwnedFd> {
            // SAFETY: unshare takes an integer and changes this thread alone, which ends right after.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(std::io::Error::last_os_error())
                    .context("cannot make a network namespace: this needs root (CAP_SYS_ADMIN)");
            }
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        });
        let held = made.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        let namespace = Self { held: Arc::new(held) };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// What child processes are started with.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.held
    }

    /// Moves the calling thread into it, for good.
    ///
    /// # Errors
    ///
    /// Not root.
    pub fn enter(&self) -> anyhow::Result<()> {
        // SAFETY: setns takes two integers; the descriptor is open for as long as `self` lives.
        if unsafe { libc::setns(self.held.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot enter a network namespace");
        }
        Ok(())
    }

    /// Whether somebody listens there, as it is seen from in it.
    pub fn reaches(&self, address: SocketAddr) -> bool {
        let look = || self.enter().is_ok() && TcpStream::connect(address).is_ok();
        // A thread of its own: a namespace is entered for good.
        thread::scope(|scope| scope.spawn(look).join().unwrap_or(false))
    }

    /// Runs `ip ARGUMENTS` in it.
    ///
    /// # Errors
    ///
    /// What `ip` says.
    pub fn ip(&self, arguments: &str) -> anyhow::Result<()> {
        self.run("ip", arguments)
    }

    /// Runs `PROGRAM ARGUMENTS` in it.
    ///
    /// # Errors
    ///
    /// What the program says.
    pub fn run(&self, program: &str, arguments: &str) -> anyhow::Result<()> {
        self.output(program, arguments).map(drop)
    }

    /// Runs `PROGRAM ARGUMENTS` in it: what it prints.
    ///
    /// # Errors
    ///
    /// What the program says.
    pub fn output(&self, program: &str, arguments: &str) -> anyhow::Result<String> {
        let held = self.held.as_raw_fd();
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace());
        // SAFETY: the closure makes one system call with two integers; the descriptor is open in the forked child.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(held, libc::CLONE_NEWNET) == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            });
        }
        let output = command
            .output()
            .with_context(|| format!("cannot run `{program}`: install iproute2 and iptables"))?;
        if !output.status.success() {
            bail!(
                "`{program} {arguments}`: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.held.as_raw_fd())
    }
}

/// Hosts on one switch.
#[derive(Debug)]
pub struct Network {
    /// Where the load balancer, the clients and etcd are.
    pub hub: Namespace,
    /// The nodes.
    pub nodes: Vec<Namespace>,
}

impl Network {
    /// Address of the hub.
    pub const HUB: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));

    /// Address of a node, from 0 on.
    pub fn node_address(index: usize) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, 11 + index as u8))
    }

    /// `nodes` hosts and the hub, each reaching each other.
    ///
    /// # Errors
    ///
    /// Not root, or no `ip`.
    pub fn new(nodes: usize) -> anyhow::Result<Self> {
        let hub = Namespace::new()?;
        hub.ip("link add br0 type bridge")?;
        hub.ip(&format!("addr add {}/24 dev br0", Self::HUB))?;
        hub.ip("link set br0 up")?;
        let mut made = Vec::with_capacity(nodes);
        for index in 0..nodes {
            let node = Namespace::new()?;
            hub.ip(&format!(
                "link add n{index} type veth peer name eth0 netns {}",
                node.path()
            ))?;
            hub.ip(&format!("link set n{index} master br0 up"))?;
            node.ip(&format!("addr add {}/24 dev eth0", Self::node_address(index)))?;
            node.ip("link set eth0 up")?;
            made.push(node);
        }
        Ok(Self { hub, nodes: made })
    }
}
