//! flexnbd: a network block device server that moves a disk image to another machine while its clients go on using it.
//!
//! One thread, one readiness loop, one direction. A turn of the loop is a pipe:
//!
//! ```text
//!  socket bytes ─> ServerSession ─> work::Op ─> Disk ─> work::Done ─> reply ─> Outbox ─> socket
//! ```
//!
//! Where another server has the image, it stands in the place of the disk ([`upstream`]), and its connection is one more slot.
//!
//! The layers, top down; imports go down only, and the modules of one line never name each other:
//!
//! ```text
//!  main      arguments in, exit code out
//!  cli       arguments -> checked configuration; the exit codes
//!  server    the loop: sockets, disk, protocol and clock meet here      remote   the modes that only talk to a server
//!  proto     NBD, bytes <-> meaning          command   control lines    acl      who may connect
//!  migrate   what a migration sends next     event     parts of a loop  logging  lines on stderr
//!  upstream  what another server owes
//!  disk      the image
//!  work      what may be asked of an image
//!  sys       libc and io_uring, the only unsafe code
//!  buffer    memory for payloads             bitmap    a bit for each block
//!  endpoint  where a server is           printable  text of others       bucket  a rate that is kept
//! ```
//!
//! What is marked PURE in its own docs sees no socket, no file and no clock, and is tested and fuzzed on bytes alone.
//!
//! # Words
//!
//! | word | means |
//! |---|---|
//! | image | the file or block device that is served |
//! | export | what a client sees of the image: a size and transmission flags |
//! | session | one end of an NBD conversation, as bytes in and out ([`proto`]) |
//! | cookie | 8 bytes that name a request to the peer; the reply repeats them |
//! | tag | names a request within its session, and which slice of a READ, from the session to the disk and back |
//! | operation | one thing the disk is asked to do: [`work::Op`], which becomes [`work::Done`] |
//! | slice | the largest piece of a payload that is held in memory at once |
//! | slot | a connection, a listener or the signals, as the loop takes turns with them |
//! | key | names a slot, its token, its timers and its operations; a later slot at the same place has another one |
//! | turn | one pass of the loop through the pipe |
//! | effect | what one slot asks of another, done at the end of the turn |
//! | gate | decides whether a client's request may pass now; a request that may not is kept |
//! | quota | what all clients together may ask for per second |
//! | migration | an image on its way to another server: one or more attempts, each of several passes |
//! | pass | one way through the blocks that are dirty |
//! | dirty | of a block in a migration: changed since it was last sent. Of bytes at another server: it has answered that they are written, and may forget them |
//! | pause | the end of a migration, in which no client's request passes |
//! | sender, listener | who brings an image, and the server that waits for it |
//! | proxy | a server with another server in place of a disk; clients do not notice when that is away |
//! | relay | what the source of a migration is when it goes on serving its clients from the destination |
//! | upstream | the server behind a proxy or a relay, and what it owes |
//! | replay | writing again what is dirty there, before anything else, over a new connection |
//! | fence | the rule that a new connection of a named session is answered when the older one can change nothing more |
//! | sealing | making a received image durable before the program says that it has arrived |
//!
//! # Where would it go?
//!
//! | a change of | goes to |
//! |---|---|
//! | what bytes mean, what is refused, what a reply looks like | `proto` |
//! | how a request is done, in which order, what is durable when | `disk` |
//! | what a migration sends next, when clients are paused | `migrate` |
//! | what another server is asked again, in which order, and what is kept for that | `upstream` |
//! | which server that is, when it is tried again, refused or given up | `server/upstream` |
//! | when a slot gets a turn, who is let in, what closes it | `server` |
//! | a control command: its words, what it does | `command`, then `server/commands.rs` |
//! | an option or an exit code | `cli` |
//! | a call of the C library | `sys`, and nowhere else |
//! | a unit of systemd, the Debian package | `src/dist` |
//! | a manual page or a completion | `build.rs`; what the page of the program explains, the README |

pub mod acl;
pub mod bitmap;
pub mod bucket;
pub mod buffer;
pub mod cli;
pub mod command;
pub mod disk;
pub mod endpoint;
pub mod event;
pub mod logging;
pub mod migrate;
pub mod printable;
pub mod proto;
pub mod remote;
pub mod server;
pub mod sys;
pub mod upstream;
pub mod work;
