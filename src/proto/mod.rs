//! PURE: the NBD protocol as functions from bytes to meaning and back.
//!
//! ```text
//!  oldstyle:  greeting ────────────────┐
//!             "Oldstyle negotiation"   v
//!                                   Request ──> (Payload ──>) Request ... ──> Closing
//!                                      ^   "Request message",                 DISC, end of stream, violation:
//!  newstyle:  greeting ─> Handshake ───┘   "Simple reply message",            "Terminating the transmission phase"
//!             "Newstyle negotiation"       "Structured reply chunk message"
//! ```
//!
//! These are the states of [`server`], the server's side of a conversation. [`client`] goes through the same ones from
//! the other side: it awaits the greeting, then replies and the data behind them. Both are machines: bytes received go
//! in, bytes to send come out, and each owns what waits on the way.
//!
//! [`wire`] holds the constants and fixed messages and decides nothing, [`error`] what can be wrong, [`export`] what both
//! sides have agreed on, [`outbox`] what waits to be sent.
//!
//! Everything that comes from a peer is hostile here: lengths are checked before they are used, memory is bounded by
//! what the pool hands out, and nothing indexes or adds without looking.
#![warn(clippy::cast_possible_truncation)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose"))]

pub mod client;
pub mod error;
pub mod export;
pub mod outbox;
pub mod server;
pub mod wire;
