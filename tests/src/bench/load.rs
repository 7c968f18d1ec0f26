//! Load: h2load (nghttp2) in the shapes that are compared, and what the backend says it has served.
//!
//! Input: a port. Output: a running client, and counts. Must never measure a connection that is not open yet.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use super::machine::{Cores, pinned};
use crate::process::{Process, wait_for};

/// How long a client may take to be in full swing.
const PATIENCE: Duration = Duration::from_secs(60);

/// h2load ends by itself after so long, whatever becomes of its starter.
const BOUND_SECONDS: u32 = 60;

/// The object each request asks for.
const OBJECT: &str = "/api/v1/namespaces/default/pods/web-0";

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 20 connections with 10 requests in flight each.
    Batched,
    /// 200 connections with one request in flight each.
    Spread,
    /// 2,000 requests a second over 20 connections.
    Paced,
    /// One connection, one request at a time.
    Sequential,
}

impl Shape {
    /// In the order of the table.
    pub const ALL: [Self; 4] = [Self::Batched, Self::Spread, Self::Paced, Self::Sequential];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Batched => "batched",
            Self::Spread => "spread",
            Self::Paced => "paced",
            Self::Sequential => "sequential",
        }
    }

    fn connections(self) -> u64 {
        match self {
            Self::Batched | Self::Paced => 20,
            Self::Spread => 200,
            Self::Sequential => 1,
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Batched => &["-c20", "-m10"],
            Self::Spread => &["-c200", "-m1"],
            Self::Paced => &["-c20", "-m10", "--rps=100"],
            Self::Sequential => &["-c1", "-m1"],
        }
    }
}

/// Bodies of 64 MiB, over four connections with one at a time each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From the server, by clients with large windows.
    Download,
    /// The same by one that reads more slowly than the server sends (curl).
    SlowDownload,
    /// To the server, by its own windows.
    Upload,
}

impl Transfer {
    /// In the order of the table.
    pub const ALL: [Self; 3] = [Self::Download, Self::SlowDownload, Self::Upload];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Download => "download",
            Self::SlowDownload => "slow download",
            Self::Upload => "upload",
        }
    }
}

/// How fast a slow reader is: octets in a second, as curl takes it. Any proxy passes more.
const SLOW_RATE: &str = "100M";

/// How long a body is.
const BODY: u64 = 64 << 20;

/// What the backend has served so far, and what is open now.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Served {
    /// Objects, ever.
    pub requests: u64,
    /// Watches, now.
    pub watches: u64,
    /// Events of watches, ever.
    pub events: u64,
    /// Connections, now.
    pub connections: u64,
    /// Octets of transfers, ever.
    pub octets: u64,
}

/// The load generator and the backend's plain port.
pub struct Load<'a> {
    /// h2load.
    pub program: &'a Path,
    /// What it needs beside the system's libraries.
    pub libraries: &'a Path,
    /// Where the backend tells its figures.
    pub figures: SocketAddr,
    /// Where clients run.
    pub cores: Cores,
    /// Logs.
    pub directory: &'a Path,
}

impl Load<'_> {
    /// What the backend says.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub fn served(&self) -> anyhow::Result<Served> {
        let mut stream = TcpStream::connect(self.figures).context("the backend does not tell its figures")?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("the backend's figures are cut")?;
        serde_json::from_str(body).context("the backend's figures are not JSON")
    }

    fn command(&self, port: u16, path: &str) -> Command {
        let mut command = pinned(self.cores.others, self.program);
        command
            .env("LD_LIBRARY_PATH", self.libraries)
            .arg("-t1")
            .arg(format!("https://{}:{port}{path}", Ipv4Addr::LOCALHOST));
        command
    }

    /// Starts requests of a shape, and waits until every connection has asked.
    ///
    /// # Errors
    ///
    /// h2load ends or does not get through.
    pub fn requests(&self, port: u16, shape: Shape) -> anyhow::Result<Running> {
        let log = self.directory.join("requests.tsv");
        // A log of an earlier run is not this one's.
        let _ = fs::remove_file(&log);
        let mut command = self.command(port, OBJECT);
        command.args(shape.flags()).arg(format!("-D{BOUND_SECONDS}"));
        if shape == Shape::Sequential {
            command.arg("--log-file").arg(&log);
        }
        let before = self.served()?;
        let mut running = Running {
            client: Process::start("h2load", command, None, self.directory)?,
        };
        // All connections are made at once: by then each has had many turns.
        self.wait(&mut running, |now| {
            now.requests >= before.requests + 50 * shape.connections()
        })?;
        Ok(running)
    }

    /// One body after the other over one connection, each read at a limited rate: what is sent beyond it waits.
    fn slow_reader(&self, port: u16) -> Command {
        let mut command = pinned(self.cores.others, "curl");
        command
            .args(["--silent", "--show-error", "--fail", "--insecure", "--http2"])
            .args(["--limit-rate", SLOW_RATE, "--output", "/dev/null"])
            .args(["--max-time", &BOUND_SECONDS.to_string()])
            .arg(format!("https://{}:{port}/transfer?[1-90]", Ipv4Addr::LOCALHOST));
        command
    }

    /// Starts transfers, and waits until a whole body has passed.
    ///
    /// # Errors
    ///
    /// h2load ends or does not get through.
    pub fn transfers(&self, port: u16, transfer: Transfer) -> anyhow::Result<Running> {
        let mut command = if transfer == Transfer::SlowDownload {
            self.slow_reader(port)
        } else {
            let mut command = self.command(port, "/transfer");
            // Windows of 16 and 64 MiB, as clients in Java and browsers have them.
            command
                .args(["-c4", "-m1", "-w24", "-W26"])
                .arg(format!("-D{BOUND_SECONDS}"));
            command
        };
        if transfer == Transfer::Upload {
            let body = self.directory.join("body");
            fs::File::create(&body)
                .and_then(|file| file.set_len(BODY))
                .with_context(|| format!("cannot make {}", body.display()))?;
            command.arg("--data").arg(&body);
        }
        let before = self.served()?;
        let mut running = Running {
            client: Process::start("h2load", command, None, self.directory)?,
        };
        self.wait(&mut running, |now| now.octets >= before.octets + BODY)?;
        Ok(running)
    }

    /// Starts `connections` clients with one watch each, and waits until all are open; `period` between a watch's
    /// events, or only its first one.
    ///
    /// # Errors
    ///
    /// h2load ends or does not get through.
    pub fn watches(&self, port: u16, connections: u64, period: Option<Duration>) -> anyhow::Result<Running> {
        let period = period.map_or(0, |period| period.as_micros());
        let mut command = self.command(port, &format!("/api/v1/pods?watch=true&period_us={period}"));
        command
            .arg(format!("-c{connections}"))
            .arg(format!("-n{connections}"))
            .arg("-m1");
        if connections > 200 {
            // No faster than listen queues are emptied.
            command.arg("-r500");
        }
        wait_for(PATIENCE, || (self.served().ok()?.watches == 0).then_some(()))
            .context("watches whose client has gone are still open at the backend")?;
        let mut running = Running {
            client: Process::start("h2load", command, None, self.directory)?,
        };
        self.wait(&mut running, |now| now.watches == connections)?;
        Ok(running)
    }

    fn wait(&self, running: &mut Running, ready: impl Fn(Served) -> bool) -> anyhow::Result<()> {
        let mut trouble = None;
        let seen = wait_for(PATIENCE, || {
            if let Err(error) = running.client.is_running() {
                trouble = Some(error);
                return Some(());
            }
            self.served().ok().filter(|now| ready(*now)).map(|_| ())
        });
        match (seen, trouble) {
            (_, Some(error)) => Err(error),
            (None, None) => bail!("the load did not come up; the backend serves {:?}", self.served()),
            (Some(()), None) => Ok(()),
        }
    }

    /// The median of the response times of the sequential run that has just ended.
    ///
    /// # Errors
    ///
    /// It wrote no log.
    pub fn median_us(&self) -> anyhow::Result<f64> {
        let path = self.directory.join("requests.tsv");
        let text = fs::read_to_string(&path).with_context(|| format!("h2load wrote no {}", path.display()))?;
        let mut times = Vec::new();
        for line in text.lines() {
            let mut columns = line.split('\t').skip(1);
            let (Some(status), Some(time)) = (columns.next(), columns.next()) else {
                continue;
            };
            anyhow::ensure!(status == "200", "a request was answered with {status}");
            times.push(time.parse::<u64>().context("a response time is not a number")?);
        }
        times.sort_unstable();
        let middle = times.get(times.len() / 2).context("h2load logged no request")?;
        Ok(*middle as f64)
    }
}

/// A client at work; it ends when this goes.
pub struct Running {
    client: Process,
}

impl Running {
    /// Its process.
    pub fn id(&self) -> u32 {
        self.client.id()
    }

    /// Whether it is still at work.
    ///
    /// # Errors
    ///
    /// It has ended by itself.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.client.is_running()
    }

    /// Ends it; what it has logged is on disk then.
    pub fn stop(mut self) {
        self.client.terminate(Duration::from_secs(5));
    }
}
