//! Behind the proxy is `flexnbd serve`, which is killed and started again.

use super::door;
use crate::support::fading::Style;
use crate::support::newstyle::PORT;
use crate::support::shadow::{Habits, Shadowing};
use crate::support::{reserved_port, Server, TempDir, SOON};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;

const SIZE: usize = 1 << 20;

/// `flexnbd serve` of this file on these ports, oldstyle and newstyle. The harness starts it on port 0: the shell puts
/// another in place of that, and becomes the server.
#[track_caller]
fn serve(image: &Path, ports: [u16; 2]) -> Server {
    const SCRIPT: &str =
        r#"bin=$1 addr=$4 file=$6; shift 8; exec "$bin" serve --addr "$addr" --port "$0" --file "$file" "$@""#;
    let [oldstyle, newstyle] = ports.map(|port| port.to_string());
    let builder = Server::serve().file(image.to_path_buf()).through(&["sh", "-c", SCRIPT, &oldstyle]);
    // The kernel takes its time to close a file that a ring of a killed process has used, and until then it is locked.
    builder.engine("sync").arg("--newstyle-port").arg(newstyle).start()
}

/// A client works through the proxy while the server is killed so often, in either style.
fn killed(rounds: u64) {
    for (style, client_style) in [(Style::Oldstyle, Style::Newstyle), (Style::Newstyle, Style::Oldstyle)] {
        let dir = TempDir::new();
        let image = dir.join("image");
        File::create(&image).unwrap().set_len(SIZE as u64).unwrap();
        let ports = [reserved_port(), reserved_port()];
        let mut server = serve(&image, ports);
        let to = SocketAddr::from(([127, 0, 0, 1], ports[usize::from(style == Style::Newstyle)]));
        let proxy = Server::proxy(to).arg(PORT).start();
        let client = Shadowing::start(door(&proxy, client_style), SIZE, 7, Habits::usual(client_style));
        for round in 0..rounds {
            if !client.goes_on(20) {
                break;
            }
            server.process.signal("KILL");
            server.process.wait(SOON);
            server = serve(&image, ports);
            assert!(server.process.is_running(), "round {round}");
        }
        let shadow = client.stop().unwrap_or_else(|why| panic!("{why}; {}", proxy.log()));
        assert_eq!(shadow.differs(&fs::read(&image).unwrap()), None);
        assert_eq!(proxy.status().number("reconnects"), rounds, "{}", proxy.status().line());
        proxy.expect_healthy();
    }
}

#[test]
fn a_server_that_is_killed_thirty_times_costs_its_client_time_only() {
    killed(15);
}

#[test]
#[ignore = "takes a minute"]
fn a_server_that_is_killed_two_hundred_times_costs_its_client_time_only() {
    killed(100);
}
