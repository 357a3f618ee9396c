//! The specification of NBD (`doc/proto.md`), rule by rule.

mod durability;
mod handshake;
mod hostile;
mod structured;
mod transmission;
