//! The loop against a disk whose operations complete later: progress is told from flight.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail by panic")]
#![allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]

use super::admit::CONTROLS_MAX;
use super::backend::Backend;
use super::config::{Backing, Image, Rates};
use super::life::Life;
use super::reactor::Reactor;
use super::reason::Next;
use super::shared::Shared;
use super::signals::Signals;
use super::slot::Slot;
use super::{Config, ControlDoor, Dialect, Door, Flow, Role};
use crate::acl::Acl;
use crate::command::{encode_command, Reader};
use crate::disk::{Access, Disk, EngineChoice};
use crate::endpoint::Endpoint;
use crate::migrate::Incoming;
use crate::proto::wire::{kind, transmission, Greeting, RequestHead, GREETING_LEN, SIMPLE_REPLY_LEN};
use mio::Events;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long each operation takes.
const DELAY: Duration = Duration::from_millis(200);
/// When a test has failed.
const LIMIT: Duration = Duration::from_secs(30);

/// A server of a file of its own.
struct House {
    path: PathBuf,
    server: Reactor,
}

impl House {
    /// A server whose disk takes `delay` for each operation.
    fn new(name: &str, delay: Duration) -> Self {
        Self::of(name, Role::Serve { adopt: false }, delay)
    }

    fn of(name: &str, role: Role, delay: Duration) -> Self {
        let path = std::env::temp_dir().join(format!("flexnbd-loop-{name}-{}", std::process::id()));
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let config = Config {
            doors: vec![(Door::At(Endpoint::Tcp("127.0.0.1:0".parse().unwrap())), Dialect::Oldstyle)],
            export_name: String::new(),
            control: Some(ControlDoor::At(path.with_extension("control"))),
            acl: Acl::new(Vec::new(), false),
            killswitch_ms: None,
            max_clients: 10,
            rates: Rates::default(),
            upstream_limit_ms: 30_000,
            backing: Backing::Image(Image {
                file: path.clone(),
                disk_engine: EngineChoice::Sync,
                access: Access::Alone,
                sync: false,
                role,
                request_limit_ms: 60_000,
            }),
        };
        let disk = Backend::Disk(Box::new(Disk::open_slow(&path, delay)));
        let mut server = Reactor::new(disk, Signals::new().unwrap(), &config).unwrap();
        assert!(server.open(config.doors, config.control).unwrap());
        if let Life::Receiving { incoming, .. } = &mut server.shared.life {
            // So that the only operations are those of senders.
            incoming.marked();
        }
        Self { path, server }
    }

    /// A client in a thread of its own, past its greeting.
    fn client(&self, conversation: impl FnOnce(TcpStream) + Send + 'static) -> JoinHandle<()> {
        let address = self.server.addresses.first().unwrap().1.clone();
        thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.read_exact(&mut [0; GREETING_LEN]).unwrap();
            conversation(stream);
        })
    }

    /// Sends `acl` with one entry, in a thread of its own, which ends with the answer.
    fn acl(&self, entry: &str) -> JoinHandle<String> {
        let (path, command) = (self.path.with_extension("control"), format!("acl\n{entry}\n\n"));
        thread::spawn(move || {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(command.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        })
    }

    /// Takes turns until this is so; says how many.
    fn turns_until(&mut self, mut is_so: impl FnMut(&Shared) -> bool) -> usize {
        let (mut events, mut batch) = (Events::with_capacity(16), Vec::new());
        let (mut turns, began) = (0, Instant::now());
        while !is_so(&self.server.shared) {
            assert!(began.elapsed() < LIMIT, "after {turns} turns");
            assert!(matches!(self.server.turn(&mut events, &mut batch), Ok(Flow::Continue)));
            turns += 1;
        }
        turns
    }

    /// Takes turns until a client has come and gone, and all it asked for; says how many.
    fn turns_until_alone(&mut self) -> usize {
        let mut came = false;
        self.turns_until(|shared| {
            came |= shared.admission.clients() > 0;
            came && shared.admission.clients() == 0 && shared.backend.in_flight() == 0
        })
    }

    /// A sender that asks for something, which the disk has then, and is gone.
    fn lose_sender(&mut self, request: Vec<u8>) {
        let lost = self.client(move |mut stream| stream.write_all(&request).unwrap());
        self.turns_until(|shared| shared.backend.in_flight() == 1);
        lost.join().unwrap();
        self.turns_until(|shared| shared.admission.clients() == 0);
    }
}

impl Drop for House {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn head(kind: u16, cookie: u64, length: u32) -> Vec<u8> {
    RequestHead { flags: 0, kind, cookie, offset: 0, length }.encode().to_vec()
}

/// A WRITE of 4 KiB.
fn write(byte: u8) -> Vec<u8> {
    [head(kind::WRITE, 1, 4096), vec![byte; 4096]].concat()
}

const LISTEN: Role = Role::Listen { then_serve: false };

#[test]
fn the_loop_sleeps_while_operations_fly() {
    let mut house = House::new("sleeps", DELAY);
    let began = Instant::now();
    let client = house.client(|mut stream| {
        stream.write_all(&[head(kind::READ, 1, 4096), head(kind::FLUSH, 2, 0)].concat()).unwrap();
        stream.read_exact(&mut [0; 2 * SIMPLE_REPLY_LEN + 4096]).unwrap();
    });
    let turns = house.turns_until_alone();
    client.join().unwrap();
    assert!(began.elapsed() >= DELAY);
    assert!(turns < 20, "{turns} turns for two operations");
}

#[test]
fn a_full_session_is_woken_by_its_completions() {
    // More than may be in flight, and payloads for more memory than a client may have.
    const REQUESTS: u64 = 100;
    const LENGTH: usize = 64 << 10;
    let mut house = House::new("full", DELAY);
    let client = house.client(|mut stream| {
        let mut requests = Vec::new();
        for cookie in 0..REQUESTS {
            requests.extend(head(kind::WRITE, cookie, LENGTH as u32));
            requests.resize(requests.len() + LENGTH, 7);
        }
        let mut writer = stream.try_clone().unwrap();
        let sender = thread::spawn(move || writer.write_all(&requests).unwrap());
        stream.read_exact(&mut [0; REQUESTS as usize * SIMPLE_REPLY_LEN]).unwrap();
        sender.join().unwrap();
    });
    let turns = house.turns_until_alone();
    client.join().unwrap();
    assert!(turns < 2000, "{turns} turns for {REQUESTS} writes");
}

#[test]
fn a_client_that_leaves_does_not_wake_the_loop_for_what_it_left() {
    let mut house = House::new("left", DELAY);
    let memory = house.server.shared.pool.available();
    let client = house.client(|mut stream| stream.write_all(&head(kind::READ, 1, 4096).repeat(32)).unwrap());
    let turns = house.turns_until_alone();
    client.join().unwrap();
    assert!(turns < 100, "{turns} turns");
    assert_eq!(house.server.shared.pool.available(), memory, "what it had in the disk came back");
}

/// A client that asks for 32 writes and waits for the end of its connection.
fn writer(house: &House) -> JoinHandle<()> {
    house.client(|mut stream| {
        let write = [head(kind::WRITE, 1, 512), vec![7; 512]].concat();
        stream.write_all(&write.repeat(32)).unwrap();
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)), "nothing was answered");
    })
}

#[test]
fn an_access_list_is_answered_when_the_kernel_is_done_with_what_it_refuses() {
    // Longer than it takes a busy machine to hand over 32 operations.
    let mut house = House::new("fenced", DELAY * 10);
    let client = writer(&house);
    house.turns_until(|shared| shared.backend.flying().len() == 32);
    let acl = house.acl("127.0.0.2");
    house.turns_until(|shared| shared.admission.clients() == 0);
    let turns = house.turns_until(|shared| shared.admission.controls_left() == CONTROLS_MAX);
    assert!(house.server.shared.backend.flying().is_empty());
    assert_eq!(acl.join().unwrap(), "0: updated\n");
    assert!(turns < 1000, "{turns} turns");
    client.join().unwrap();
}

#[test]
fn an_access_list_is_answered_also_while_the_disk_hangs() {
    let mut house = House::new("hangs", LIMIT * 10);
    let client = writer(&house);
    house.turns_until(|shared| shared.backend.flying().len() == 32);
    let acl = house.acl("127.0.0.2");
    house.turns_until(|shared| shared.admission.clients() == 0);
    house.turns_until(|shared| shared.admission.controls_left() == CONTROLS_MAX);
    assert_eq!(acl.join().unwrap(), "1: 32 operations are still in the disk\n");
    client.join().unwrap();
}

#[test]
fn a_killswitch_fires_while_the_kernel_has_the_requests() {
    let mut house = House::new("killed", LIMIT * 10);
    house.server.shared.limits.killswitch_ms = Some(100);
    let client = writer(&house);
    house.turns_until(|shared| shared.backend.flying().len() == 32);
    let turns = house.turns_until(|shared| shared.admission.clients() == 0);
    assert!(turns < 100, "{turns} turns");
    client.join().unwrap();
}

#[test]
fn what_may_change_the_image_is_counted_while_it_flies() {
    let mut house = House::new("changing", DELAY);
    let client = house.client(|mut stream| {
        stream.write_all(&[write(1), head(kind::FLUSH, 2, 0), head(kind::READ, 3, 512), write(4)].concat()).unwrap();
        stream.read_exact(&mut [0; 4 * SIMPLE_REPLY_LEN + 512]).unwrap();
    });
    house.turns_until(|shared| shared.backend.in_flight() == 4);
    assert_eq!(house.server.shared.gate.changing(), 2, "a migration that began now would wait for the writes");
    house.turns_until_alone();
    client.join().unwrap();
    assert_eq!(house.server.shared.gate.changing(), 0);
}

#[test]
fn a_listener_greets_while_its_disk_works_for_a_sender_that_is_gone() {
    for (request, joins) in [(write(1), false), (head(kind::FLUSH, 1, 0), true)] {
        // What was begun is not done before the test is over.
        let mut house = House::of("greets", LISTEN, LIMIT * 10);
        house.lose_sender(request);
        let sender = house.client(|mut stream| {
            stream.write_all(&[write(2), write(2)].concat()).unwrap();
            // Until the server is gone.
            let _ = stream.read(&mut [0]);
        });
        if joins {
            house.turns_until(|shared| shared.backend.in_flight() == 3);
        } else {
            house.turns_until(|shared| shared.gate.keeps_somebody());
            assert_eq!(house.server.shared.backend.in_flight(), 1, "what the next one writes might be overwritten");
        }
        drop(house);
        sender.join().unwrap();
    }
}

#[test]
fn the_next_sender_goes_on_when_the_disk_is_done_with_the_last() {
    let mut house = House::of("next", LISTEN, DELAY);
    house.lose_sender(write(1));
    let sender = house.client(|mut stream| {
        stream.write_all(&write(2)).unwrap();
        stream.read_exact(&mut [0; SIMPLE_REPLY_LEN]).unwrap();
    });
    let turns = house.turns_until_alone();
    sender.join().unwrap();
    assert_eq!(fs::read(&house.path).unwrap()[..4096], [2; 4096]);
    assert!(turns < 100, "{turns} turns");
}

/// Its end would tell the sender that its image is durable.
#[test]
fn no_deadline_ends_a_sender_whose_image_is_made_durable() {
    const SIZE: u64 = 1 << 20;
    let mut house = House::new("sealing", DELAY);
    house.server.shared.life = Life::Receiving { incoming: Incoming::new(SIZE), then_serve: true };
    let sender = house.client(|mut stream| {
        let write = [head(kind::WRITE, 1, SIZE as u32), vec![7; SIZE as usize], head(kind::DISC, 2, 0)].concat();
        stream.write_all(&write).unwrap();
        stream.read_exact(&mut [0; SIMPLE_REPLY_LEN]).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    });
    house.turns_until(|shared| matches!(shared.life, Life::Sealing { .. }));
    // An hour goes by.
    let Life::Sealing { sender: key, .. } = house.server.shared.life else { panic!("it was sealing") };
    house.server.shared.now_ms += 3_600_000;
    let slot = house.server.slots.get_mut(key).unwrap();
    assert!(matches!(slot.timeout(key, &mut house.server.shared), Next::Idle));
    house.turns_until(|shared| matches!(shared.life, Life::Serving));
    sender.join().unwrap();
}

/// A migration has four reads in the disk at once. They are behind those of clients that came in the same turn, although
/// it was the first to have something to do.
#[test]
fn the_reads_of_a_migration_are_several_and_behind_those_of_clients() {
    // Longer than a turn of a busy machine.
    let mut house = House::new("depth", DELAY * 10);
    fs::write(&house.path, vec![1; 1 << 20]).unwrap();
    let destination = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(&house.server.addresses.first().unwrap().1).unwrap();
    client.set_nonblocking(true).unwrap();
    house.turns_until(|_| client.peek(&mut [0; GREETING_LEN]).is_ok_and(|came| came == GREETING_LEN));

    let [client_key] = house.server.keys_of(|slot| matches!(slot, Slot::Client(_)))[..] else { panic!("one client") };
    let port = destination.local_addr().unwrap().port().to_string();
    let wanted = encode_command(&["mirror", "127.0.0.1", &port, "nothing"]);
    let command = Reader::default().push(&wanted).unwrap().unwrap();
    assert!(house.server.execute(client_key, command).is_none(), "it is answered when the destination has greeted");
    let mut source = destination.accept().unwrap().0;
    source.write_all(&Greeting { size: 1 << 20, flags: transmission::HAS_FLAGS.into() }.encode()).unwrap();

    // The first question is whether there is data. Then it has something to do in the next turn, whatever comes.
    house.turns_until(|shared| shared.backend.in_flight() == 1);
    house.turns_until(|shared| shared.backend.in_flight() == 0);
    let reads: Vec<u8> = (0..8).flat_map(|cookie| head(kind::READ, cookie, 4096)).collect();
    client.write_all(&reads).unwrap();
    house.turns_until(|shared| shared.backend.in_flight() > 0);
    let migration_key = house.server.shared.life.mirror().unwrap();
    let expected = [vec![client_key.to_u64(); 8], vec![migration_key.to_u64(); 4]].concat();
    assert_eq!(house.server.shared.backend.flying(), expected);
}
