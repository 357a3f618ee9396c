//! An NBD client that keeps a server busy at little cost of its own: one thread, no allocation per request, everything
//! that waits is sent by one call and everything that came is received by one.

mod connection;
mod flights;
mod handshake;
mod plan;
mod replies;
mod report;
mod socket;
mod walk;
mod work;

use std::io;
use std::time::Instant;

use mio::{Events, Poll, Token};

pub use plan::Plan;
pub use report::Report;

use connection::Connection;
use work::Work;

/// What one call receives at most.
const RECEIVE_BYTES: usize = 1 << 20;

/// Runs the jobs to their end and reports on each, in their order.
pub fn run(plan: &Plan) -> io::Result<Vec<Report>> {
    let mut poll = Poll::new()?;
    let mut works = Vec::new();
    let mut connections = Vec::new();
    for (index, job) in plan.jobs.iter().enumerate() {
        let (sockets, size) = plan.connect(job.connections)?;
        let work = Work::new(job, size)?;
        for (part, socket) in sockets.into_iter().enumerate() {
            let token = Token(connections.len());
            connections.push(Connection::new(socket, index, part, &work, poll.registry(), token)?);
        }
        works.push(work);
    }

    let begun = Instant::now();
    let end = plan.duration.map(|duration| begun + duration);
    for work in &mut works {
        work.begin(begun);
    }
    let mut events = Events::with_capacity(connections.len());
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut patient_since = begun;
    loop {
        let mut now = Instant::now();
        let is_late = end.is_some_and(|end| now >= end);
        let mut wake = end.filter(|_| !is_late);
        for connection in &mut connections {
            let work = &mut works[connection.job];
            if is_late {
                work.stop();
            }
            if connection.is_ready() {
                now = connection.receive(work, &mut buffer)?;
            }
            connection.issue(work, now)?;
            let due = if connection.is_ready() { Some(now) } else { work.due().filter(|_| connection.has_room()) };
            wake = wake.into_iter().chain(due).min();
        }
        patient_since = works.iter().map(|work| work.report.last).fold(patient_since, Instant::max);
        if connections.iter().all(Connection::is_idle) {
            if works.iter().all(Work::is_over) {
                break;
            }
            patient_since = now;
        }
        let give_up = patient_since + plan.stall;
        if now >= give_up {
            return Err(io::Error::other(format!("no reply for {:?}", plan.stall)));
        }
        let timeout = wake.map_or(give_up, |wake| wake.min(give_up)) - now;
        match poll.poll(&mut events, Some(timeout)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in &events {
            connections[event.token().0].set_ready();
        }
    }
    for connection in connections {
        connection.close()?;
    }
    Ok(works.into_iter().map(|work| work.report).collect())
}
