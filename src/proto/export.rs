//! What a client and a server have agreed on: the export, how requests are judged and answered, and which of them are
//! offered.
//!
//! Specification: "Transmission flags", "`NBD_OPT_STRUCTURED_REPLY`", "Metadata querying".

use super::wire::transmission;

/// What is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// Nobody may change it.
    pub read_only: bool,
}

impl Export {
    /// The transmission flags of everything a client of this style may ask for.
    pub fn flags(&self, style: Style) -> u16 {
        use transmission as t;
        let changes = t::SEND_FLUSH | t::SEND_FUA | t::SEND_TRIM | t::SEND_WRITE_ZEROES;
        let (always, negotiated) =
            if self.read_only { (t::READ_ONLY, t::SEND_CACHE) } else { (changes, t::SEND_CACHE | t::SEND_FAST_ZERO) };
        let always = always | t::HAS_FLAGS | t::CAN_MULTI_CONN;
        match style {
            Style::Oldstyle => always,
            Style::Newstyle(Agreed { structured: false, .. }) => always | negotiated,
            Style::Newstyle(_) => always | negotiated | t::SEND_DF,
        }
    }
}

/// What a server offers: an export from the client's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
}

impl Offer {
    /// True when it has this transmission flag.
    pub fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The id of the only metadata context, `base:allocation`, in replies.
pub const ALLOCATION_ID: u32 = 1;

/// What client and server have agreed on in a newstyle negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Agreed {
    /// Structured replies.
    pub structured: bool,
    /// The client may ask for `base:allocation`.
    pub allocation: bool,
}

/// How requests are judged and answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// As the predecessor did.
    Oldstyle,
    /// As was agreed on.
    Newstyle(Agreed),
}

impl Style {
    /// True when READs get structured replies.
    pub fn structured(self) -> bool {
        matches!(self, Self::Newstyle(Agreed { structured: true, .. }))
    }

    /// True when `BLOCK_STATUS` is answered.
    pub fn allocation(self) -> bool {
        matches!(self, Self::Newstyle(Agreed { allocation: true, .. }))
    }
}
