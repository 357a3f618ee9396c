//! Parts of an event loop that do not know what the loop serves.
//!
//! - [`slots`] owns the state machines and names each with a [`slots::Key`] that is never mistaken for a later one's.
//! - [`ready`] remembers what an edge-triggered poll has reported.
//! - [`run_queue`] holds the slots that have work left.
//! - [`wheel`] says when the next deadline is due; [`alarm`] is one slot's entry in it.
//!
//! A `Key` names poll tokens, timers and operations alike, so that one rule covers everything that arrives late: a key
//! of an older generation finds nothing. Nothing here reads a clock: callers pass in the time, in monotonic milliseconds.

pub mod alarm;
pub mod ready;
pub mod run_queue;
pub mod slots;
pub mod wheel;
