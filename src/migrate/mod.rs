//! PURE: what a migration sends next, and what has been received of one. Time comes in as a parameter, in milliseconds.
//!
//! ```text
//!  Copying ──> Quiescing ──> LastPass ──> Marking ──> Marked ──> Committed
//!     ^            │             │ └──── where there is no mark ────^
//!     └────────────┴─────────────┘  the pause took too long: clients go on, and so does the copy
//!     release_clients(): after the commit, clients go on where the image stays
//!     lost(): everything is dirty again, from any phase
//! ```
//!
//! The source ([`Plan`]) sees the image as a bitmap of blocks, all of them dirty at first. A pass goes over the dirty
//! blocks in order; what clients write meanwhile belongs to the next pass. When another pass would gain nothing and
//! what is left can be sent within the pause target, clients are paused and the rest is sent. What their operations in
//! flight will change counts as left. Where clients dirty blocks faster than they can be sent, their writes are slowed
//! down, twice as much after every pass that gained nothing.
//!
//! The destination ([`Incoming`]) counts which bytes its sender has written: only all of them are an image. Both sides mark
//! their images ([`Mark`]), so that neither is served as what it is not.
//!
//! Nothing here reads, sends or waits: a [`Step`] says what to do, and the caller says what came of it.
//!
//! Invariants:
//! 1. No two requests in flight overlap: the destination may carry them out in any order.
//! 2. A block is cleared when it is taken, before it is read, and set when a write to it is done, before that write is
//!    answered: at every moment an answered write is at the destination, in flight, taken, or dirty.
//! 3. A range is sent as zeroes only when nothing was written to it since the disk was asked, and found a hole there.
//! 4. [`Step::Commit`] comes only after [`Plan::quiesced`], with nothing dirty, nothing in flight, and everything
//!    flushed where the destination can; where there are marks, after [`Plan::marked`].

mod changes;
mod flush;
mod holes;
mod incoming;
mod mark;
mod meter;
mod pace;
mod pass;
mod pause;
mod plan;
mod settle;

pub use incoming::Incoming;
pub use mark::{Mark, Where};
pub use pass::IN_FLIGHT_MAX;
pub use plan::{Abilities, Plan, Progress, Step, DATA_MAX};
