//! Where kubelets are, by the apiservers' own audit logs.
//!
//! Job: which apiserver had each kubelet's last request, and which watches of theirs each has open.
//! Must never ask an agent or a balancer: all contenders are judged by the same word.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::bench::audit::Log;

/// What an apiserver writes of a request.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    #[serde(rename = "auditID")]
    audit_id: String,
    stage: String,
    verb: String,
    user: User,
    request_received_timestamp: String,
}

#[derive(Deserialize)]
struct User {
    username: String,
}

/// One apiserver.
#[derive(Debug, Default)]
struct Apiserver {
    /// Of the process that is there.
    log: Option<Log>,
    /// Audit ids of the watches that are open.
    watches: BTreeSet<String>,
}

/// The logs of all apiservers.
#[derive(Debug)]
pub struct Audit {
    directory: PathBuf,
    apiservers: Vec<Apiserver>,
    /// When each kubelet's last request came, as the apiserver writes it, and to which.
    last: BTreeMap<String, (String, usize)>,
    /// Processes so far.
    processes: usize,
}

impl Audit {
    /// For so many apiservers, with its files in `directory`.
    pub fn new(apiservers: usize, directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            apiservers: (0..apiservers).map(|_| Apiserver::default()).collect(),
            last: BTreeMap::new(),
            processes: 0,
        }
    }

    /// What that apiserver's next process is started with; what the last one had open is gone.
    pub fn flags(&mut self, apiserver: usize) -> anyhow::Result<[String; 2]> {
        self.processes += 1;
        let log = Log::new(
            &self.directory,
            &format!("audit-{}-{}.log", apiserver + 1, self.processes),
        )?;
        let flags = log.flags();
        self.apiservers[apiserver] = Apiserver {
            log: Some(log),
            watches: BTreeSet::new(),
        };
        Ok(flags)
    }

    /// That apiserver has ended, and its watches with it.
    pub fn ended(&mut self, apiserver: usize) {
        self.apiservers[apiserver].watches.clear();
    }

    /// Reads what was written since the last look.
    pub fn look(&mut self) -> anyhow::Result<()> {
        for (index, apiserver) in self.apiservers.iter_mut().enumerate() {
            let events = apiserver.log.as_mut().map_or(Ok(Vec::new()), Log::events)?;
            for event in events {
                apiserver.count(event, index, &mut self.last);
            }
        }
        Ok(())
    }

    /// Kubelets at each apiserver: each is where its last request went.
    pub fn loads(&self) -> Vec<usize> {
        let mut loads = vec![0; self.apiservers.len()];
        for (_, index) in self.last.values() {
            loads[*index] += 1;
        }
        loads
    }

    /// Watches that each apiserver has open.
    pub fn watches(&self) -> Vec<usize> {
        self.apiservers
            .iter()
            .map(|apiserver| apiserver.watches.len())
            .collect()
    }
}

impl Apiserver {
    fn count(&mut self, event: Event, index: usize, last: &mut BTreeMap<String, (String, usize)>) {
        let is_watch = event.verb == "watch";
        match event.stage.as_str() {
            "ResponseStarted" if is_watch => {
                self.watches.insert(event.audit_id);
            }
            // The end of a watch says where its kubelet was when it began.
            "ResponseComplete" | "Panic" if is_watch => {
                self.watches.remove(&event.audit_id);
                return;
            }
            "ResponseComplete" => {}
            _ => return,
        }
        let at = event.request_received_timestamp;
        // RFC 3339 in UTC with six digits of a second: the order of the text is that of time.
        let is_newer = last.get(&event.user.username).is_none_or(|(earlier, _)| *earlier <= at);
        if is_newer {
            last.insert(event.user.username, (at, index));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _};

    use serde_json::json;

    use super::*;

    fn line(id: &str, stage: &str, verb: &str, user: &str, second: u32) -> String {
        let event = json!({
            "auditID": id, "stage": stage, "verb": verb, "user": {"username": user},
            "requestReceivedTimestamp": format!("2026-01-01T00:00:{second:02}.000000Z"),
        });
        format!("{event}\n")
    }

    fn write(flags: &[String; 2], text: &str) {
        let path = flags[1].strip_prefix("--audit-log-path=").expect("the flag");
        let mut file = File::options().create(true).append(true).open(path).expect("the log");
        file.write_all(text.as_bytes()).expect("a disk");
    }

    #[test]
    fn a_kubelet_is_where_its_last_request_came_and_a_watch_is_open_until_it_or_its_apiserver_ends() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut audit = Audit::new(2, directory.path());
        let (one, other) = (audit.flags(0).expect("a policy"), audit.flags(1).expect("a policy"));
        write(&one, &line("a", "ResponseStarted", "watch", "k-1", 1));
        write(&one, &line("b", "ResponseComplete", "update", "k-2", 2));
        // The start of a line whose end is not written yet.
        let third = line("c", "ResponseComplete", "update", "k-1", 3);
        write(&other, &third[..20]);
        audit.look().expect("lines");
        assert_eq!((audit.loads(), audit.watches()), (vec![2, 0], vec![1, 0]));

        write(&other, &third[20..]);
        // It began before the request that came last, so it says nothing of where the kubelet is.
        write(&one, &line("a", "ResponseComplete", "watch", "k-1", 1));
        write(&one, &line("d", "ResponseStarted", "watch", "k-2", 4));
        audit.look().expect("lines");
        assert_eq!((audit.loads(), audit.watches()), (vec![1, 1], vec![1, 0]));

        audit.ended(0);
        assert_eq!(audit.watches(), [0, 0]);
    }
}
