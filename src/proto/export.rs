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
    /// What is asked to be durable can be made so: FLUSH and FUA are offered.
    pub flushes: bool,
    /// A client may have more than one connection: what was answered to one is seen by all.
    pub several: bool,
}

impl Export {
    /// The transmission flags of everything a client of this style may ask for.
    pub fn flags(&self, style: Style) -> u16 {
        use transmission as t;
        let durable = if self.flushes { t::SEND_FLUSH | t::SEND_FUA } else { 0 };
        let changes = durable | t::SEND_TRIM | t::SEND_WRITE_ZEROES;
        let (always, negotiated) =
            if self.read_only { (t::READ_ONLY, t::SEND_CACHE) } else { (changes, t::SEND_CACHE | t::SEND_FAST_ZERO) };
        let always = always | t::HAS_FLAGS | if self.several { t::CAN_MULTI_CONN } else { 0 };
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
    /// What was agreed on beyond the export.
    pub agreed: Agreed,
}

impl Offer {
    /// True when it has this transmission flag.
    pub fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The metadata context that says what is allocated.
pub const ALLOCATION: &[u8] = b"base:allocation";

/// The id of `base:allocation` in the replies of this server.
pub const ALLOCATION_ID: u32 = 1;

/// The id of the context that names a session. Nothing is ever said of it.
pub const SESSION_ID: u32 = 2;

/// What the metadata context starts with that names a session.
const SESSION: &str = "flexnbd:session:";

/// What a server says that awaits an image, when it is asked by a client that wants to be served.
pub const NOT_YET: &[u8] = b"not yet";

/// The name of a client's session: 128 random bits, by which a server recognises a connection that takes the place of an
/// older one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionName(pub [u8; 16]);

impl SessionName {
    /// The metadata context that stands for it.
    pub fn context(self) -> String {
        format!("{SESSION}{:032x}", u128::from_be_bytes(self.0))
    }

    /// The session that a metadata context stands for.
    pub fn parse(context: &[u8]) -> Option<Self> {
        let digits = std::str::from_utf8(context.strip_prefix(SESSION.as_bytes())?).ok()?;
        // Parsing alone would allow a sign.
        let is_name = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_name.then(|| u128::from_str_radix(digits, 16).ok()).flatten().map(|name| Self(name.to_be_bytes()))
    }
}

/// What client and server have agreed on in a newstyle negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Agreed {
    /// Structured replies.
    pub structured: bool,
    /// The client may ask for `base:allocation`.
    pub allocation: bool,
    /// The client has named its session.
    pub session: Option<SessionName>,
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

    /// What the client has named its session.
    pub fn session(self) -> Option<SessionName> {
        match self {
            Self::Newstyle(agreed) => agreed.session,
            Self::Oldstyle => None,
        }
    }

    /// True when `BLOCK_STATUS` is answered.
    pub fn allocation(self) -> bool {
        matches!(self, Self::Newstyle(Agreed { allocation: true, .. }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_connections_are_offered_where_they_are_taken() {
        let flags = |several| {
            let export = Export { size: 512, read_only: false, flushes: true, several };
            [Style::Oldstyle, Style::Newstyle(Agreed::default())].map(|style| export.flags(style))
        };
        let (one, all) = (flags(false), flags(true));
        assert_eq!(one.map(|flags| flags | transmission::CAN_MULTI_CONN), all);
        assert_eq!(all.map(|flags| flags & !transmission::CAN_MULTI_CONN), one);
    }

    #[test]
    fn a_session_has_the_name_of_its_context() {
        let name = SessionName([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xa, 0xb, 0xc, 0xd, 0xe, 0xff]);
        assert_eq!(name.context(), "flexnbd:session:000102030405060708090a0b0c0d0eff");
        assert_eq!(SessionName::parse(name.context().as_bytes()), Some(name));
        assert_eq!(SessionName::parse(b"flexnbd:session:000102030405060708090A0B0C0D0EFF"), Some(name));
        for ill_formed in ["", "00", "+00102030405060708090a0b0c0d0eff", "000102030405060708090a0b0c0d0eff0", "g"] {
            assert_eq!(SessionName::parse(format!("flexnbd:session:{ill_formed:0>32}0").as_bytes()), None);
            assert_eq!(SessionName::parse(format!("flexnbd:session:{ill_formed}").as_bytes()), None, "{ill_formed}");
        }
        assert_eq!(SessionName::parse(b"flexnbd:session:00010203040506070809\xffa0b0c0d0eff"), None);
    }
}
