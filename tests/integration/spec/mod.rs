//! The rules of the NBD specification (`doc/proto.md`). A test names the section whose rule it checks, or says that the
//! specification leaves the matter open.

mod durability;
mod handshake;
mod hostile;
mod structured;
mod transmission;
