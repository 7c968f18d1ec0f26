//! What the agents do together, in virtual time: the figures they are held to, the scenarios, and the safety envelope.

mod envelope;
mod figures;
mod scenarios;
mod unkind;
