//! flexnbd: a network block device server that moves a disk image to another machine while its clients go on using it.
//!
//! One thread, one readiness loop, one direction. A turn of the loop is a pipe:
//!
//! ```text
//!  socket bytes ─> ServerSession ─> work::Op ─> Disk ─> work::Done ─> reply ─> Outbox ─> socket
//! ```
//!
//! The layers, top down; imports go down only, and the modules of one line never name each other:
//!
//! ```text
//!  main      arguments in, exit code out
//!  cli       arguments -> checked configuration; the exit codes
//!  server    the loop: sockets, disk, protocol and clock meet here      remote   the modes that only talk to a server
//!  proto     NBD, bytes <-> meaning          command   control lines    acl      who may connect
//!  migrate   what a migration sends next     event     parts of a loop  logging  lines on stderr
//!  disk      the image
//!  work      what may be asked of an image
//!  buffer    memory for payloads             bitmap    ranges of a file sys      libc, the only unsafe code
//!  endpoint  where a server is               fuzzing   ways in for fuzzers; nothing of the program uses it
//! ```
//!
//! What is marked PURE in its own docs sees no socket, no file and no clock, and is tested and fuzzed on bytes alone.

pub mod acl;
pub mod bitmap;
pub mod buffer;
pub mod cli;
pub mod command;
pub mod disk;
pub mod endpoint;
pub mod event;
pub mod fuzzing;
pub mod logging;
pub mod migrate;
pub mod proto;
pub mod remote;
pub mod server;
pub mod sys;
pub mod work;
