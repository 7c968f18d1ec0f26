//! The figures as one JSON object, and docs/flood.md.
//!
//! Must never call a bound kept that is not.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{FLOODER, Figures, Row, Way, world::ARTICLE};
use crate::bench::machine::{kernel_release, processor};

/// What memory may grow with what `advise` printed, of what it grew without.
const GROWTH_BOUND: f64 = 1.0 / 3.0;

/// What 99 of 100 bystanders may wait, likewise.
const P99_BOUND: f64 = 0.2;

impl Way {
    fn in_words(self) -> &'static str {
        match self {
            Self::Nothing => "nothing: Kubernetes' own levels",
            Self::Article => "a level with few shares, as published",
            Self::Advised => "what `rebalancer advise` printed",
        }
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

impl Figures {
    fn row(&self, way: Way, relayed: bool) -> Option<&Row> {
        self.rows.iter().find(|row| row.way == way && row.relayed == relayed)
    }

    /// With a way over with nothing: growth and P99.
    fn ratios(&self, way: Way, relayed: bool) -> (f64, f64) {
        match (self.row(way, relayed), self.row(Way::Nothing, relayed)) {
            (Some(with), Some(without)) => (
                with.growth_kib() as f64 / without.growth_kib().max(1) as f64,
                with.flood.p99_ms() / without.flood.p99_ms(),
            ),
            _ => (f64::NAN, f64::NAN),
        }
    }

    /// The object of figures.
    pub fn json(&self) -> Value {
        let pair = |way, relayed| {
            let (growth, p99) = self.ratios(way, relayed);
            json!({"peak_growth_ratio": rounded(growth), "bystander_p99_ratio": rounded(p99)})
        };
        let mut object = pair(Way::Advised, false);
        object["relayed"] = pair(Way::Advised, true);
        object["article"] = pair(Way::Article, false);
        object["rows"] = self.rows.iter().map(row_json).collect();
        object
    }

    /// Whether both bounds are kept, with the relay and without.
    pub fn holds(&self) -> bool {
        [false, true].into_iter().all(|relayed| {
            let (growth, p99) = self.ratios(Way::Advised, relayed);
            growth <= GROWTH_BOUND && p99 <= P99_BOUND
        })
    }

    /// docs/flood.md.
    pub fn page(&self) -> String {
        let effort = &self.effort;
        let mut page = format!(
            "\
# Who floods, and what holds them

This page is written by `cargo xtask bench flood`.

{} clients of one service account, each with its token, LIST {} custom resources at once, again and again for {} s, and each reads {} kB a second.
An apiserver makes each answer whole before it is read: what slow readers leave unread stays in its memory, once for each
request that runs. That is a well-known way to lose a control plane, and no load balancing helps: each apiserver that such
clients are moved to is next.

## What it does to an apiserver, and what holds it

kube-apiserver 1.36 with etcd on one machine, a fresh one for each row; {}, Linux {}.
Memory is the apiserver's resident set before the flood and at its highest, looked at each 20 ms.
Bystanders are two nodes' clients that ask for one small object each 100 ms, whatever became of the request before.
Only rows of one run mean anything beside each other.

| what holds them | relay | memory before, MiB | peak, MiB | growth | of nothing's | bystanders' P50, ms | P99, ms | of nothing's | longest, ms | calm P99, ms | LISTs served | refused (429) |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
",
            effort.clients,
            effort.objects,
            effort.seconds,
            effort.pace / 1000,
            processor(),
            kernel_release(),
        );
        for row in &self.rows {
            let (growth, p99) = self.ratios(row.way, row.relayed);
            // Writing to a String cannot fail.
            let _ = writeln!(
                page,
                "| {} | {} | {} | {} | {} | {growth:.2} | {:.0} | {:.0} | {p99:.2} | {:.0} | {:.0} | {} | {} |",
                row.way.in_words(),
                if row.relayed { "yes" } else { "no" },
                row.before_kib / 1024,
                row.peak_kib / 1024,
                row.growth_kib() / 1024,
                row.flood.p50_ms(),
                row.flood.p99_ms(),
                row.flood.max_ms(),
                row.flood.calm_p99_ms(),
                row.flood.lists,
                row.flood.statuses.get("429").copied().unwrap_or_default(),
            );
        }
        let verdict = if self.holds() {
            "Both are kept"
        } else {
            "Not all of them are kept"
        };
        let _ = writeln!(
            page,
            "\nWith what `advise` printed memory is to grow at most {GROWTH_BOUND:.2} times as much as with nothing, and \
             bystanders' P99 to be at most {P99_BOUND:.2} times theirs. {verdict} in this run."
        );
        let relay: Vec<u64> = self.rows.iter().filter_map(|row| row.relay_kib).collect();
        if let Some(most) = relay.iter().max() {
            let _ = writeln!(
                page,
                "The relay itself took {:.1} MiB more at most: it holds no answer, but passes frames on as fast as they are read.",
                *most as f64 / 1024.0
            );
        }
        let heaviest = self.row(Way::Nothing, true).and_then(|row| row.heaviest.as_ref());
        if let Some(heaviest) = heaviest {
            let user = match &heaviest.user {
                Some(user) => format!("user `{user}`"),
                None => "no user, since a token names none to the relay".to_owned(),
            };
            let _ = writeln!(
                page,
                "With nothing that holds them, the heaviest line of `rebalancer flows` had {user}, user agent `{}`, FlowSchema \
                 `{}`, {:.0} MB: that is whom to ask about.",
                heaviest.user_agent, heaviest.schema, heaviest.megabytes
            );
        }
        page + &self.rest()
    }

    fn rest(&self) -> String {
        format!(
            "
## Finding who it is

```console
$ rebalancer flows                          # who asks for what now: user, user agent, FlowSchema, priority level
$ rebalancer connections --by user          # connections, open streams and octets of each user
```

An apiserver names the FlowSchema and the priority level of each request in its answer; the relay reads them as they pass, so
`flows` needs no credentials of the clients. A user is named where a client certificate names one: whose a token is the relay
does not know, and the line has the user agent and the FlowSchema: so it was in this flood, for service accounts come with
tokens. A user agent is what a client calls itself. Streams that wait for their answer stand in a line without a FlowSchema.
Whoever is refused most, has most streams open or asks most is among the lines too, however few octets that is. Names in place of UIDs take `--peers kubernetes` and one right ([membership.md](membership.md#what-it-takes)).
Who asks is for whoever owns the agent's socket: it is in no metric, in no snapshot and on no page.

While an apiserver answers too late the agents hold `apiserver_overloaded` ([agent.md](agent.md#holds-and-what-to-do)): its
clients are not moved onto its neighbours.

## Holding them

```console
$ rebalancer advise --user {FLOODER}
$ rebalancer advise --user {FLOODER} --user-agent cilium-agent/     # with what the relay saw of them
$ rebalancer advise --user {FLOODER} | kubectl apply --dry-run=server -f -
```

It prints a PriorityLevelConfiguration and a FlowSchema for the user (or `--group`), and as comments why, and what it will
cost those clients and everybody else. Nothing is applied. The arithmetic is the documented one:

- **Seats**: a level's shares of all levels' shares, of `--max-requests-inflight` and `--max-mutating-requests-inflight`
  together, rounded up. A LIST from the watch cache takes 15 % of its level's seats and ten of them at most; shares are the
  most with which at most `--lists` (4) large ones run at once.
- **Watches**: informers of client-go 1.35 and later read what they would LIST by a watch that begins with all objects
  (`sendInitialEvents`). APF seats it as it does a LIST until these are sent; after that, as with any other watch, it has no
  seat. So `list` and `watch` are held unless `--verb` says otherwise, and watches wait in the same queues to begin.
- **`borrowingLimitPercent: 0`**: without it a level takes every seat that others lend, which is nearly all of them, and its
  own shares are no bound. That is why the row in the middle of the table holds nothing.
- **`lendablePercent: 50`**: of seats that the hold leaves free others borrow up to half, so that at first fewer LISTs run than
  it says; each 10 s the apiserver decides anew, and gives back what is wanted.
- **Queues**: one for one user, whose requests are one flow. For a group each user is a flow, and the fewest queues are taken
  with which a quiet user is crowded out by `--heavy` (4) flooding ones in at most one case of a hundred (shuffle sharding).
- **`matchingPrecedence`**: before the first schema that takes any of their requests with these verbs, whatever these are for;
  each one that it comes before is named. Leader election asks for no list and no watch, and stays where it is. A user's hold
  comes two before that, a group's one, and of equal ones the first by name counts: a user's hold comes before his group's,
  whichever is asked for first. Which groups a plain user is in is not known: which schemas, such as `exempt` with
  `system:masters`, would then come before the hold is said.

Without an agent, or without that right: `kubectl get prioritylevelconfigurations,flowschemas -o json | rebalancer advise
--user NAME --levels -`.

What was applied in the last rows of the table:

```yaml
{}
```

And in those before, as published (palark.com, \"Kubernetes API flow control management\") with the fields of today:

```yaml
{}
```
",
            self.advice.trim_end(),
            ARTICLE.trim(),
        )
    }
}

fn row_json(row: &Row) -> Value {
    json!({
        "way": format!("{:?}", row.way).to_lowercase(),
        "relayed": row.relayed,
        "before_mib": row.before_kib / 1024,
        "peak_mib": row.peak_kib / 1024,
        "relay_growth_mib": row.relay_kib.map(|kib| rounded(kib as f64 / 1024.0)),
        "bystander_p50_ms": rounded(row.flood.p50_ms()),
        "bystander_p99_ms": rounded(row.flood.p99_ms()),
        "bystander_max_ms": rounded(row.flood.max_ms()),
        "bystanders_failed": row.flood.failed,
        "calm_p99_ms": rounded(row.flood.calm_p99_ms()),
        "answers": row.flood.statuses,
        "lists": row.flood.lists,
    })
}
