//! The relay's figures as a table, as a page and as one JSON object.
//!
//! Input: [`Figures`]. Must never round a figure so that a bound it misses looks kept.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{
    load::{Shape, Transfer},
    machine::{kernel_release, processor},
    peers::Peer,
    relay::{Counted, Figures, Sample},
};

/// What the relay may spend of what haproxy spends, by shape.
const BOUNDS: [(Shape, f64); 4] = [
    (Shape::Batched, 0.85),
    (Shape::Spread, 0.7),
    (Shape::Paced, 0.6),
    (Shape::Sequential, 0.75),
];

/// What the relay may spend of what the floor spends.
const FLOOR_BOUND: f64 = 1.08;

/// The same for transfers.
const TRANSFER_BOUND: f64 = 1.05;

/// The median.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

fn of(samples: Option<&Vec<Sample>>, figure: impl Fn(&Sample) -> f64) -> f64 {
    median(samples.into_iter().flatten().map(figure).collect())
}

impl Figures {
    /// The proxy's time for a request, in microseconds.
    fn proxy_us(&self, shape: Shape, peer: Peer) -> f64 {
        of(self.requests.get(&(shape.name(), peer)), |sample| sample.proxy_us)
    }

    /// Proxy's and backend's together.
    fn total_us(&self, shape: Shape, peer: Peer) -> f64 {
        of(self.requests.get(&(shape.name(), peer)), |sample| {
            sample.proxy_us + sample.backend_us
        })
    }

    /// How often the proxy slept for a request.
    fn counted(&self, shape: Shape, peer: Peer, figure: impl Fn(&Counted) -> f64) -> f64 {
        self.counted.get(&(shape.name(), peer)).map_or(f64::NAN, figure)
    }

    fn sleeps(&self, shape: Shape, peer: Peer) -> f64 {
        of(self.requests.get(&(shape.name(), peer)), |sample| sample.sleeps)
    }

    /// The proxy's processor seconds for a GiB.
    fn gib_seconds(&self, transfer: Transfer, peer: Peer) -> f64 {
        of(self.transfers.get(&(transfer.name(), peer)), |sample| {
            sample.proxy_us * 1024.0 / 1e6
        })
    }

    fn event_us(&self, peer: Peer) -> f64 {
        of(self.events.get(&peer), |sample| sample.proxy_us)
    }

    fn latency_us(&self, peer: Option<Peer>) -> f64 {
        median(self.latency.get(&peer).cloned().unwrap_or_default())
    }

    fn added_us(&self, peer: Peer) -> f64 {
        self.latency_us(Some(peer)) - self.latency_us(None)
    }

    fn kib(&self) -> f64 {
        self.held_relay.map_or(f64::NAN, |held| held.kib_per_client)
    }

    /// The object of figures and ratios.
    pub fn json(&self) -> Value {
        let by_shape = |figure: &dyn Fn(Shape) -> f64| -> Value {
            Shape::ALL
                .into_iter()
                .map(|shape| (shape.name().to_owned(), json!(rounded(figure(shape)))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let by_transfer = |figure: &dyn Fn(Transfer) -> f64| -> Value {
            Transfer::ALL
                .into_iter()
                .map(|transfer| (transfer.name().to_owned(), json!(rounded(figure(transfer)))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let by_peer = |figure: &dyn Fn(Peer) -> Value| -> Value {
            Peer::ALL
                .into_iter()
                .map(|peer| (peer.name().to_owned(), figure(peer)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let others = |figure: &dyn Fn(Peer) -> Value| -> Value {
            let Value::Object(mut map) = by_peer(figure) else {
                return Value::Null;
            };
            map.remove(Peer::Relay.name());
            map.into()
        };
        json!({
            "cpu_per_request_vs": others(&|peer| by_shape(&|shape| {
                self.proxy_us(shape, Peer::Relay) / self.proxy_us(shape, peer)
            })),
            "total_cpu_vs": others(&|peer| by_shape(&|shape| {
                self.total_us(shape, Peer::Relay) / self.total_us(shape, peer)
            })),
            "cpu_per_gib_vs": others(&|peer| by_transfer(&|transfer| {
                self.gib_seconds(transfer, Peer::Relay) / self.gib_seconds(transfer, peer)
            })),
            "cpu_seconds_per_gib": by_peer(&|peer| by_transfer(&|transfer| self.gib_seconds(transfer, peer))),
            "sleeps_per_request": by_peer(&|peer| by_shape(&|shape| self.sleeps(shape, peer))),
            "calls_per_request": by_peer(&|peer| by_shape(&|shape| self.counted(shape, peer, |each| each.calls))),
            "timers_per_request": by_peer(&|peer| by_shape(&|shape| self.counted(shape, peer, |each| each.timers))),
            "cpu_per_watch_event_vs": others(&|peer| json!(rounded(self.event_us(Peer::Relay) / self.event_us(peer)))),
            "added_latency_vs": others(&|peer| json!(rounded(self.added_us(Peer::Relay) / self.added_us(peer)))),
            "kib_per_watch_connection": rounded(self.kib()),
            "watch_connections_held": self.held_relay.map(|held| held.clients),
            "us_per_request": by_peer(&|peer| by_shape(&|shape| self.proxy_us(shape, peer))),
            "us_per_request_with_backend": by_peer(&|peer| by_shape(&|shape| self.total_us(shape, peer))),
            "us_per_watch_event": by_peer(&|peer| json!(rounded(self.event_us(peer)))),
            "added_latency_us": by_peer(&|peer| json!(rounded(self.added_us(peer)))),
            "direct_latency_us": rounded(self.latency_us(None)),
            "kib_per_watch_connection_of": by_peer(&|peer| json!(self.held.get(&peer).map(|held| rounded(held.kib_per_client)))),
            "others_share": {"median": rounded(median(self.others.clone())), "worst": rounded(self.worst())},
        })
    }

    fn worst(&self) -> f64 {
        self.others.iter().copied().fold(0.0, f64::max)
    }

    /// The tables, as Markdown: readable on a terminal too.
    pub fn page(&self) -> String {
        let mut page = String::new();
        self.write(&mut page)
            .expect("writing to a string fails only when memory does");
        page
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        writeln!(
            page,
            "{}, Linux {}; {}.",
            processor(),
            kernel_release(),
            self.versions.join(", ")
        )?;
        writeln!(
            page,
            "Each figure is the median of {} turns, taken in alternation.",
            self.latency.get(&None).map_or(0, Vec::len)
        )?;
        writeln!(
            page,
            "Quiet: other programs had {:.1} % of the two processors in the median turn, {:.1} % in the worst.",
            100.0 * median(self.others.clone()),
            100.0 * self.worst()
        )?;

        writeln!(page, "\nProcessor time of the proxy for a request, in microseconds:\n")?;
        writeln!(
            page,
            "| shape | relay | floor | passthrough | haproxy | Envoy | relay / floor | bound | relay / haproxy | bound | relay / Envoy |"
        )?;
        writeln!(page, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        for (shape, bound) in BOUNDS {
            let [relay, floor, passthrough, haproxy, envoy] = Peer::ALL.map(|peer| self.proxy_us(shape, peer));
            writeln!(
                page,
                "| {} | {relay:.1} | {floor:.1} | {passthrough:.1} | {haproxy:.1} | {envoy:.1} | {} | {FLOOR_BOUND} | {} | {bound} | {} |",
                shape.name(),
                rounded(relay / floor),
                rounded(relay / haproxy),
                rounded(relay / envoy),
            )?;
        }

        writeln!(
            page,
            "\nProcessor time of proxy and backend together, in microseconds:\n"
        )?;
        writeln!(
            page,
            "| shape | relay | floor | passthrough | haproxy | Envoy | relay / haproxy | bound |"
        )?;
        writeln!(page, "|---|--:|--:|--:|--:|--:|--:|--:|")?;
        for shape in Shape::ALL {
            let [relay, floor, passthrough, haproxy, envoy] = Peer::ALL.map(|peer| self.total_us(shape, peer));
            writeln!(
                page,
                "| {} | {relay:.1} | {floor:.1} | {passthrough:.1} | {haproxy:.1} | {envoy:.1} | {} | 1.0 |",
                shape.name(),
                rounded(relay / haproxy),
            )?;
        }

        writeln!(
            page,
            "\nProcessor seconds of the proxy for a GiB, in bodies of 64 MiB:\n"
        )?;
        writeln!(
            page,
            "| direction | relay | floor | passthrough | haproxy | Envoy | relay / floor | bound | relay / haproxy | bound |"
        )?;
        writeln!(page, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        for transfer in Transfer::ALL {
            let [relay, floor, passthrough, haproxy, envoy] = Peer::ALL.map(|peer| self.gib_seconds(transfer, peer));
            writeln!(
                page,
                "| {} | {relay:.2} | {floor:.2} | {passthrough:.2} | {haproxy:.2} | {envoy:.2} | {} | {TRANSFER_BOUND} | {} | 1.0 |",
                transfer.name(),
                rounded(relay / floor),
                rounded(relay / haproxy),
            )?;
        }

        writeln!(page, "\nHow often the proxy slept, and so was woken, for a request:\n")?;
        writeln!(page, "| shape | relay | floor | passthrough | haproxy | Envoy |")?;
        writeln!(page, "|---|--:|--:|--:|--:|--:|")?;
        for shape in Shape::ALL {
            let [relay, floor, passthrough, haproxy, envoy] = Peer::ALL.map(|peer| self.sleeps(shape, peer));
            writeln!(
                page,
                "| {} | {relay:.2} | {floor:.2} | {passthrough:.2} | {haproxy:.2} | {envoy:.2} |",
                shape.name()
            )?;
        }

        if !self.counted.is_empty() {
            writeln!(
                page,
                "\nSystem calls and timers of the kernel for a request, calls / timers:\n"
            )?;
            writeln!(page, "| shape | relay | floor | passthrough | haproxy | Envoy |")?;
            writeln!(page, "|---|--:|--:|--:|--:|--:|")?;
            for shape in Shape::ALL {
                let [relay, floor, passthrough, haproxy, envoy] = Peer::ALL.map(|peer| {
                    let counted = self.counted.get(&(shape.name(), peer));
                    counted.map_or_else(String::new, |each| format!("{:.2} / {:.2}", each.calls, each.timers))
                });
                writeln!(
                    page,
                    "| {} | {relay} | {floor} | {passthrough} | {haproxy} | {envoy} |",
                    shape.name()
                )?;
            }
        }

        writeln!(page, "\nThe rest:\n")?;
        writeln!(
            page,
            "| | relay | floor | passthrough | haproxy | Envoy | relay / haproxy | bound |"
        )?;
        writeln!(page, "|---|--:|--:|--:|--:|--:|--:|--:|")?;
        let [relay, floor, passthrough, haproxy, envoy] = Peer::ALL.map(|peer| self.event_us(peer) / 10.0);
        writeln!(
            page,
            "| processor seconds for 100,000 watch events | {relay:.2} | {floor:.2} | {passthrough:.2} | {haproxy:.2} | {envoy:.2} | {} | 0.6 |",
            rounded(relay / haproxy)
        )?;
        let [relay, floor, passthrough, haproxy, envoy] = Peer::ALL.map(|peer| self.added_us(peer));
        writeln!(
            page,
            "| median latency added to {:.0} µs, sequential, in microseconds | {relay:.0} | {floor:.0} | {passthrough:.0} | {haproxy:.0} | \
             {envoy:.0} | {} | |",
            self.latency_us(None),
            rounded(relay / haproxy)
        )?;
        let [relay, floor, passthrough, haproxy, envoy] =
            Peer::ALL.map(|peer| self.held.get(&peer).map_or(f64::NAN, |held| held.kib_per_client));
        writeln!(
            page,
            "| KiB for a client with one open watch, both sides ({} clients) | {relay:.1} | {floor:.1} | {passthrough:.1} | {haproxy:.1} | \
             {envoy:.1} | {} | |",
            self.held.get(&Peer::Relay).map_or(0, |held| held.clients),
            rounded(relay / haproxy)
        )?;
        if let (Some(held), Some(worked)) = (self.held_relay, self.while_held) {
            writeln!(
                page,
                "| the same with {} clients | {:.1} | | | | | | 15 KiB |",
                held.clients, held.kib_per_client
            )?;
            writeln!(
                page,
                "\nWhile those {} watches were open, other clients made {} batched requests, each for {:.1} µs of the \
                 relay; no watch ended.",
                held.clients, worked.count, worked.proxy_us
            )?;
        }
        Ok(())
    }
}

/// Three figures behind the point: enough to compare with a bound.
pub fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert!((median(vec![4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < 1e-9);
        assert!((median(vec![9.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!(median(vec![]).is_nan());
    }
}
