//! One connection: requests out, replies in.

use std::io::{self, IoSlice};
use std::time::Instant;

use mio::{Registry, Token};

use super::flights::{disconnect, Flights};
use super::plan::Data;
use super::replies::Replies;
use super::socket::Socket;
use super::work::Work;

/// One connection.
pub struct Connection {
    /// Which job it works for.
    pub job: usize,
    /// Which connection of that job it is.
    part: usize,
    socket: Socket,
    token: Token,
    registry: Registry,
    flights: Flights,
    replies: Replies,
    is_ready: bool,
    /// Whether the kernel has no room for what is to be sent.
    is_full: bool,
    /// Whether the poll tells when it has.
    watches_room: bool,
}

impl Connection {
    pub fn new(
        mut socket: Socket,
        job: usize,
        part: usize,
        work: &Work,
        registry: &Registry,
        token: Token,
    ) -> io::Result<Self> {
        let longest = if work.plan.write_percent > 0 { work.plan.block } else { 0 };
        let flights = Flights::new(work.plan.depth, longest, work.is_checked(), work.plan.seed)?;
        let registry = registry.try_clone()?;
        socket.register(&registry, token)?;
        Ok(Self {
            job,
            part,
            socket,
            token,
            registry,
            flights,
            replies: Replies::new(),
            is_ready: false,
            is_full: false,
            watches_room: false,
        })
    }

    /// Whether nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
    }

    /// Whether another request could be in flight.
    pub fn has_room(&self) -> bool {
        self.flights.has_room()
    }

    /// Whether the socket may have something to receive.
    pub fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Readiness was told: the socket has something to receive, or room for what is to be sent.
    pub fn set_ready(&mut self) {
        self.is_ready = true;
        self.is_full = false;
    }

    /// Makes all requests that may be made, and sends what the kernel has room for.
    pub fn issue(&mut self, work: &mut Work, now: Instant) -> io::Result<()> {
        while self.flights.has_room() {
            let Some(request) = work.next(self.part, now) else { break };
            self.flights.add(&request, now);
        }
        while self.flights.has_unsent() && !self.is_full {
            self.is_full = self.flights.send(|parts| self.socket.send(parts))? == 0;
        }
        if self.is_full != self.watches_room {
            self.socket.watch_room(&self.registry, self.token, self.is_full)?;
            self.watches_room = self.is_full;
        }
        Ok(())
    }

    /// Receives by one call, and says when that was over.
    pub fn receive(&mut self, work: &mut Work, buffer: &mut [u8]) -> io::Result<Instant> {
        let discards = work.plan.data == Data::Discard;
        let (data, head) = (self.replies.data_left(), self.replies.head_left());
        let (wanted, received) = if discards && data > 0 {
            let received = self.socket.discard(data)?;
            self.replies.pass(received, &mut self.flights)?;
            (data, received)
        } else {
            let wanted = if discards { head } else { buffer.len() };
            let received = self.socket.receive(&mut buffer[..wanted])?;
            self.replies.feed(&buffer[..received], &mut self.flights)?;
            (wanted, received)
        };
        // Less than there was room for: it was all.
        self.is_ready = received == wanted;
        let now = Instant::now();
        self.flights.count(&mut work.report, now);
        Ok(now)
    }

    /// Takes leave, so that the server knows that this was all.
    pub fn close(mut self) -> io::Result<()> {
        self.socket.send(&[IoSlice::new(&disconnect())]).map(drop)
    }
}
