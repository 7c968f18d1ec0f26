//! Which flow of API Priority and Fairness an answer belongs to, and what each flow of one connection comes to.
//!
//! Job: read the two headers with which an apiserver names the FlowSchema and the PriorityLevelConfiguration of a request
//! (k8s.io/apiserver/pkg/util/flowcontrol, `X-Kubernetes-PF-FlowSchema-UID` and `-PriorityLevel-UID`), and sum by them.
//! Input: values of header fields, octets of bodies. Output: figures, a line a flow.
//! Must never hold more than [`Flows::LIMIT`] flows of a connection: a proxy's one connection may carry anybody's.

use std::fmt;

/// The header that names the FlowSchema.
pub const SCHEMA: &str = "x-kubernetes-pf-flowschema-uid";

/// The header that names the PriorityLevelConfiguration.
pub const LEVEL: &str = "x-kubernetes-pf-prioritylevel-uid";

/// An object's UID: the apiserver makes UUIDs (RFC 9562).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uid(u128);

impl Uid {
    /// Reads a UUID as it is written: 32 hexadecimal digits in five groups.
    pub fn parse(text: &[u8]) -> Option<Self> {
        if text.len() != 36 {
            return None;
        }
        let mut value = 0_u128;
        for (at, octet) in text.iter().enumerate() {
            if matches!(at, 8 | 13 | 18 | 23) {
                if *octet != b'-' {
                    return None;
                }
                continue;
            }
            value = value << 4 | u128::from(char::from(*octet).to_digit(16)?);
        }
        Some(Self(value))
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", self.0);
        let groups = [
            &digits[..8],
            &digits[8..12],
            &digits[12..16],
            &digits[16..20],
            &digits[20..],
        ];
        f.write_str(&groups.join("-"))
    }
}

impl fmt::Debug for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The FlowSchema that a request matched, and the priority level it was served at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    /// The FlowSchema's UID.
    pub schema: Uid,
    /// The PriorityLevelConfiguration's UID.
    pub level: Uid,
}

impl Flow {
    /// From the two headers' values; `None` when one is missing or is no UID, as where APF is switched off.
    pub fn of(schema: Option<&[u8]>, level: Option<&[u8]>) -> Option<Self> {
        Some(Self {
            schema: Uid::parse(schema?)?,
            level: Uid::parse(level?)?,
        })
    }
}

/// What requests of one flow came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Requests that were answered.
    pub requests: u64,
    /// Octets of their answers' bodies.
    pub octets: u64,
    /// Of them, refused for overload.
    pub refused: u64,
    /// Streams open now: answered and not ended. Without a flow: also those that wait for their answer.
    pub open: u32,
    /// Of them, watches: a watch takes what a LIST does only until its initial events are sent.
    pub watches: u32,
}

impl Figures {
    /// Both together.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.octets += other.octets;
        self.refused += other.refused;
        self.open += other.open;
        self.watches += other.watches;
    }
}

/// The place of a stream: of which flow among a connection's, and whether it is a watch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// One more than the flow's index; zero for none.
    flow: u8,
    is_watch: bool,
}

impl Slot {
    /// Where a request stands that is not answered.
    pub fn waiting(is_watch: bool) -> Self {
        Self { flow: 0, is_watch }
    }
}

/// The flows of one connection.
#[derive(Clone, Debug, Default)]
pub struct Flows {
    /// Of no flow: not answered yet, answered without the headers, or of flows for which there was no place.
    plain: Figures,
    named: Vec<(Flow, Figures)>,
    /// Answers of flows for which there was no place.
    unplaced: u64,
    changed: bool,
}

impl Flows {
    /// How many flows of one connection are told apart. A client's requests are of few: leader election, its own level.
    pub const LIMIT: usize = 16;

    /// Whether no answer has named a flow.
    pub fn is_plain(&self) -> bool {
        self.named.is_empty()
    }

    /// A request is passed on; where it stands.
    pub fn opened(&mut self, is_watch: bool) -> Slot {
        self.plain.open += 1;
        self.plain.watches += u32::from(is_watch);
        self.changed = true;
        Slot::waiting(is_watch)
    }

    /// A request that stood at `before` is answered; where it stands from now on. `is_open` says whether its stream was not
    /// ended with the answer's head.
    pub fn answered(&mut self, before: Slot, flow: Option<Flow>, refused: bool, is_open: bool) -> Slot {
        let slot = Slot {
            flow: flow.map_or(0, |flow| self.place(flow)),
            is_watch: before.is_watch,
        };
        if is_open {
            self.leave(before);
        }
        let figures = self.at(slot);
        figures.requests += 1;
        figures.refused += u64::from(refused);
        figures.open += u32::from(is_open);
        figures.watches += u32::from(is_open && slot.is_watch);
        self.changed = true;
        slot
    }

    /// Octets of an answer's body.
    pub fn add_octets(&mut self, slot: Slot, octets: u64) {
        self.at(slot).octets += octets;
        self.changed = true;
    }

    /// A stream is over.
    pub fn ended(&mut self, slot: Slot) {
        self.leave(slot);
        self.changed = true;
    }

    fn leave(&mut self, slot: Slot) {
        let figures = self.at(slot);
        debug_assert!(figures.open > 0, "what ends has begun");
        figures.open = figures.open.saturating_sub(1);
        figures.watches = figures.watches.saturating_sub(u32::from(slot.is_watch));
    }

    /// Every stream is over.
    pub fn all_ended(&mut self) {
        let named = self.named.iter_mut().map(|(_, figures)| figures);
        for figures in named.chain([&mut self.plain]) {
            (figures.open, figures.watches) = (0, 0);
        }
        self.changed = true;
    }

    /// Takes over what another one says, in the room there is.
    pub fn copy_from(&mut self, other: &Self) {
        self.plain = other.plain;
        self.named.clone_from(&other.named);
        self.unplaced = other.unplaced;
    }

    /// Whether anything changed since this was asked last.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Answers of flows for which there was no place: they are counted without their flow.
    pub fn unplaced(&self) -> u64 {
        self.unplaced
    }

    /// Each flow, those of none first.
    pub fn iter(&self) -> impl Iterator<Item = (Option<Flow>, &Figures)> {
        let named = self.named.iter().map(|(flow, figures)| (Some(*flow), figures));
        std::iter::once((None, &self.plain)).chain(named)
    }

    fn place(&mut self, flow: Flow) -> u8 {
        let found = self.named.iter().position(|(known, _)| *known == flow);
        let index = match found {
            Some(index) => index,
            None if self.named.len() < Self::LIMIT => {
                // Most connections have one or two.
                self.named.reserve_exact(1);
                self.named.push((flow, Figures::default()));
                self.named.len() - 1
            }
            None => {
                self.unplaced += 1;
                return 0;
            }
        };
        debug_assert!(self.named.len() <= Self::LIMIT);
        index as u8 + 1
    }

    fn at(&mut self, slot: Slot) -> &mut Figures {
        match slot
            .flow
            .checked_sub(1)
            .and_then(|index| self.named.get_mut(usize::from(index)))
        {
            Some((_, figures)) => figures,
            None => &mut self.plain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(number: u128) -> Flow {
        Flow {
            schema: Uid(number),
            level: Uid(u128::MAX - number),
        }
    }

    #[test]
    fn a_uid_is_a_uuid_and_nothing_else() {
        let text = "0aB1c2d3-e4f5-6789-abcd-ef0123456789";
        let uid = Uid::parse(text.as_bytes()).expect("a UUID");
        assert_eq!(uid.to_string(), text.to_lowercase());
        for wrong in [
            "",
            "0ab1c2d3e4f56789abcdef0123456789",
            "0ab1c2d3-e4f5-6789-abcd-ef012345678",
            "0ab1c2d3-e4f5-6789-abcd-ef01234567890",
            "0ab1c2d3_e4f5-6789-abcd-ef0123456789",
            "0ab1c2dg-e4f5-6789-abcd-ef0123456789",
            "+ab1c2d3-e4f5-6789-abcd-ef0123456789",
        ] {
            assert_eq!(Uid::parse(wrong.as_bytes()), None, "{wrong}");
        }
        let good = Some(text.as_bytes());
        assert!(Flow::of(good, good).is_some());
        assert_eq!(Flow::of(good, None), None);
        assert_eq!(Flow::of(Some(b"catch-all"), good), None);
    }

    #[test]
    fn a_request_stands_where_its_answer_puts_it_until_it_ends() {
        let mut flows = Flows::default();
        let (list, watch) = (flows.opened(false), flows.opened(true));
        let slot = flows.answered(list, Some(flow(1)), false, true);
        flows.add_octets(slot, 10);
        let held = flows.answered(watch, Some(flow(1)), true, true);
        flows.ended(slot);
        let shown: Vec<_> = flows.iter().map(|(flow, figures)| (flow, *figures)).collect();
        let figures = Figures {
            requests: 2,
            octets: 10,
            refused: 1,
            open: 1,
            watches: 1,
        };
        assert_eq!(shown, [(None, Figures::default()), (Some(flow(1)), figures)]);
        flows.ended(held);
        let ended: u32 = flows.iter().map(|(_, figures)| figures.open + figures.watches).sum();
        assert_eq!(ended, 0);
        assert!(flows.take_changed() && !flows.take_changed());
    }

    #[test]
    fn whatever_a_connection_carries_few_flows_are_held() {
        let mut flows = Flows::default();
        for number in 0..100 {
            flows.opened(false);
            let slot = flows.answered(Slot::default(), Some(flow(number)), false, true);
            flows.add_octets(slot, 1);
            flows.ended(slot);
        }
        assert_eq!(flows.iter().count(), 1 + Flows::LIMIT);
        assert_eq!(flows.unplaced(), 100 - Flows::LIMIT as u64);
        let mut all = Figures::default();
        flows.iter().for_each(|(_, figures)| all.add(figures));
        assert_eq!((all.requests, all.octets, all.open), (100, 100, 0));
        assert!(size_of::<Flows>() <= 80 && size_of::<(Flow, Figures)>() <= 64);
    }
}
