//! The way between a source and its destination, which cuts, holds up and tells what passes. It knows the requests of
//! the source and the replies to them, so that trouble comes at a chosen one.

use crate::plan::{Act, Moment, Trouble, When};
use crate::support::{kind, request, uninterrupted, SOON};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What somebody else has to do before the bytes go on.
pub struct Call {
    /// What it is.
    pub act: Act,
    /// To be told when it is done.
    pub done: Sender<()>,
}

/// A port that leads to the destination there is at the moment.
pub struct Forwarder {
    /// The port.
    pub address: SocketAddr,
    /// What others have to do.
    pub calls: Receiver<Call>,
    common: Arc<Common>,
    thread: Option<JoinHandle<()>>,
}

struct Common {
    target: Mutex<Option<SocketAddr>>,
    /// What is to happen; each connection takes the first, and leaves it to the next if its moment does not come.
    troubles: Mutex<VecDeque<Trouble>>,
    /// Both ends of each connection, so that they can be closed.
    streams: Mutex<Vec<TcpStream>>,
    /// What has happened without anybody else.
    happened: Mutex<Vec<Act>>,
    /// Where the last connection leads.
    last: Mutex<Option<SocketAddr>>,
    /// Who was given a DISC.
    told: Mutex<Option<SocketAddr>>,
    /// Threads that carry bytes.
    carriers: AtomicUsize,
    is_over: AtomicBool,
    size: u64,
}

impl Forwarder {
    /// Leads nowhere yet. `size` is that of the image.
    pub fn start(size: u64, troubles: impl IntoIterator<Item = Trouble>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let common = Arc::new(Common {
            target: Mutex::new(None),
            troubles: Mutex::new(troubles.into_iter().collect()),
            streams: Mutex::new(Vec::new()),
            happened: Mutex::new(Vec::new()),
            last: Mutex::new(None),
            told: Mutex::new(None),
            carriers: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            size,
        });
        let (caller, calls) = channel();
        let shared = Arc::clone(&common);
        let thread = thread::spawn(move || {
            let mut links = Vec::new();
            for stream in listener.incoming() {
                if shared.is_over.load(Ordering::Relaxed) {
                    break;
                }
                links.extend(Link::start(stream.unwrap(), &shared, &caller));
            }
            drop(caller);
            for link in links {
                let link: JoinHandle<()> = link;
                link.join().unwrap();
            }
        });
        Self { address, calls, common, thread: Some(thread) }
    }

    /// Leads there from the next connection on.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.common.target.lock().unwrap() = Some(target);
    }

    /// Where the last connection leads, and who was given a DISC: all that the source has sent, once nothing is carried.
    pub fn account(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        (*self.common.last.lock().unwrap(), *self.common.told.lock().unwrap())
    }

    /// What has happened here, without a call.
    pub fn happened(&self) -> Vec<Act> {
        self.common.happened.lock().unwrap().clone()
    }

    /// True while there is a connection, or what it has sent is not all carried.
    pub fn carries(&self) -> bool {
        self.common.carriers.load(Ordering::SeqCst) > 0
    }

    /// Cuts the connections there are.
    pub fn cut(&self) {
        for stream in self.common.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Closes everything, and returns what has not happened.
    pub fn end(mut self) -> Vec<Trouble> {
        self.close();
        std::mem::take(&mut *self.common.troubles.lock().unwrap()).into()
    }

    fn close(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.common.is_over.store(true, Ordering::Relaxed);
        // Whoever waits for something to be done waits no longer.
        self.calls.try_iter().for_each(drop);
        // So that it looks.
        let _ = TcpStream::connect(self.address);
        self.cut();
        thread.join().unwrap();
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.close();
    }
}

/// One connection: both of its ends, and what is to happen on it.
struct Link {
    common: Arc<Common>,
    caller: Sender<Call>,
    source: TcpStream,
    destination: TcpStream,
    target: SocketAddr,
    trouble: Mutex<Option<Trouble>>,
    /// The cookies of each FLUSH that has passed.
    flushes: Mutex<Vec<[u8; 8]>>,
}

impl Link {
    /// Two threads that carry bytes; none when the way leads nowhere, and the connection is closed.
    fn start(source: TcpStream, common: &Arc<Common>, caller: &Sender<Call>) -> Vec<JoinHandle<()>> {
        let Some(target) = *common.target.lock().unwrap() else { return Vec::new() };
        let Ok(destination) = TcpStream::connect(target) else { return Vec::new() };
        for stream in [&source, &destination] {
            stream.set_nodelay(true).unwrap();
            common.streams.lock().unwrap().push(stream.try_clone().unwrap());
        }
        *common.last.lock().unwrap() = Some(target);
        common.carriers.fetch_add(2, Ordering::SeqCst);
        let trouble = Mutex::new(common.troubles.lock().unwrap().pop_front());
        let (common, caller) = (Arc::clone(common), caller.clone());
        let flushes = Mutex::new(Vec::new());
        let link = Arc::new(Self { common, caller, source, destination, target, trouble, flushes });
        [Self::carry_requests as fn(&Self) -> io::Result<()>, Self::carry_replies]
            .map(|carry| {
                let link = Arc::clone(&link);
                thread::spawn(move || {
                    // An error is that one of the two has gone, which the other is to hear.
                    let _ = carry(&link);
                    link.cut();
                    link.common.carriers.fetch_sub(1, Ordering::SeqCst);
                })
            })
            .into()
    }

    fn cut(&self) {
        let _ = self.source.shutdown(Shutdown::Both);
        let _ = self.destination.shutdown(Shutdown::Both);
    }

    /// True when this is the moment for what is to happen.
    fn is_time(&self, here: impl Fn(Moment) -> bool) -> bool {
        self.trouble.lock().unwrap().as_ref().is_some_and(|trouble| here(trouble.moment))
    }

    /// Lets happen what is to happen now. An error: nothing passes any more.
    fn strike(&self, covered: u64) -> io::Result<()> {
        let Some(trouble) = self.trouble.lock().unwrap().take() else { return Ok(()) };
        if matches!(trouble.act, Act::Cut | Act::CutWithDisc | Act::Hold(_)) {
            self.common.happened.lock().unwrap().push(trouble.act);
        }
        match trouble.act {
            // Of a sender that has written everything, DISC would be the truth.
            Act::CutWithDisc if covered < self.common.size => {
                (&self.destination).write_all(&request(kind::DISC, 0, 1, 0, 0))?;
                self.destination.shutdown(Shutdown::Write)?;
                // Until it is taken for what it is, or for what it is not.
                wait_for_end(&self.destination)?;
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Act::Cut | Act::CutWithDisc => return Err(io::ErrorKind::ConnectionAborted.into()),
            Act::Hold(ms) => thread::sleep(Duration::from_millis(ms)),
            act => {
                let (done, is_done) = channel();
                // When nobody takes calls any more, or ends instead of answering, the round is past this.
                if self.caller.send(Call { act, done }).is_ok() {
                    let _ = is_done.recv_timeout(2 * SOON);
                }
            }
        }
        Ok(())
    }

    fn carry_requests(&self) -> io::Result<()> {
        let (mut requests, mut flushes) = (0, 0);
        // Bytes that were written, each time counted again: no less than what is covered.
        let mut covered = 0;
        loop {
            let mut head = [0; 28];
            (&self.source).read_exact(&mut head)?;
            let asked = u16::from_be_bytes([head[6], head[7]]);
            let length = u32::from_be_bytes(head[24..].try_into().unwrap());
            let mut bytes = head.to_vec();
            if asked == kind::WRITE {
                bytes.resize(28 + length as usize, 0);
                (&self.source).read_exact(&mut bytes[28..])?;
            }
            requests += 1;
            if asked == kind::FLUSH {
                flushes += 1;
                self.flushes.lock().unwrap().push(head[8..16].try_into().unwrap());
            }
            let is_now = |moment: Moment, when: When| match moment {
                Moment::Request(at, number) => at == when && number == requests,
                Moment::Flush(at, number) => at == when && asked == kind::FLUSH && number == flushes,
                Moment::Disc(at) => at == when && asked == kind::DISC,
                Moment::Greeting | Moment::Reply(_) | Moment::FlushReply(_) | Moment::Time(_) => false,
            };
            if self.is_time(|moment| is_now(moment, When::Before)) {
                self.strike(covered)?;
            }
            let (first, second) = bytes.split_at(bytes.len() / 2);
            if self.is_time(|moment| is_now(moment, When::Inside)) {
                (&self.destination).write_all(first)?;
                self.strike(covered)?;
                (&self.destination).write_all(second)?;
            } else {
                (&self.destination).write_all(&bytes)?;
            }
            if matches!(asked, kind::WRITE | kind::WRITE_ZEROES) {
                covered += u64::from(length);
            }
            if asked == kind::DISC {
                *self.common.told.lock().unwrap() = Some(self.target);
            }
            if self.is_time(|moment| is_now(moment, When::After)) {
                self.strike(covered)?;
            }
            if asked == kind::DISC {
                // The destination closes now; the source waits for that.
                return wait_for_end(&self.source);
            }
        }
    }

    fn carry_replies(&self) -> io::Result<()> {
        let mut greeting = [0; 152];
        (&self.destination).read_exact(&mut greeting)?;
        if self.is_time(|moment| moment == Moment::Greeting) {
            self.strike(0)?;
        }
        (&self.source).write_all(&greeting)?;
        let (mut replies, mut flushes) = (0, 0);
        loop {
            let mut reply = [0; 16];
            (&self.destination).read_exact(&mut reply)?;
            replies += 1;
            let answers_flush = self.flushes.lock().unwrap().iter().any(|cookie| reply[8..] == cookie[..]);
            flushes += u32::from(answers_flush);
            let is_now = |moment| match moment {
                Moment::Reply(number) => number == replies,
                Moment::FlushReply(number) => answers_flush && number == flushes,
                _ => false,
            };
            if self.is_time(is_now) {
                self.strike(self.common.size)?;
            }
            (&self.source).write_all(&reply)?;
        }
    }
}

/// Waits until the other end closes.
fn wait_for_end(mut stream: &TcpStream) -> io::Result<()> {
    while uninterrupted(|| stream.read(&mut [0; 4096]))? > 0 {}
    Ok(())
}

impl Drop for Link {
    fn drop(&mut self) {
        // Its moment may come on the next connection.
        if let Some(trouble) = self.trouble.lock().unwrap().take() {
            self.common.troubles.lock().unwrap().push_front(trouble);
        }
    }
}
