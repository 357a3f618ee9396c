//! Parts of an event loop that know nothing of what the loop serves.
//!
//! - [`slots`] owns the state machines and names each with a [`slots::Key`] that is never mistaken for a later one's.
//! - [`ready`] remembers what an edge-triggered poll has reported, and which slots have work left.
//! - [`wheel`] says when the next deadline is due.
//!
//! A `Key` names poll tokens, timers and operations alike, so that one rule covers everything that arrives late: a key
//! of an older generation finds nothing. Nothing here reads a clock; time is monotonic milliseconds, passed in.

pub mod ready;
pub mod slots;
pub mod wheel;
