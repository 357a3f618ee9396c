//! A round: an image, its writers, and its way from host to host.

use crate::migration::Migration;
use crate::place::Place;
use crate::plan::{Act, Host, Medium, Plan};
use crate::shadow::Shadow;
use crate::site::{serve, Site};
use crate::support::{pattern, SOON};
use crate::writer::{check_all, Writer};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// What has come of rounds.
#[derive(Default)]
pub struct Report {
    /// Images that have moved.
    pub moved: u64,
    /// Migrations that ended where they had begun.
    pub stayed: u64,
    /// Requests of writers that were answered.
    pub requests: u64,
    /// What has gone wrong.
    pub happened: Vec<Act>,
}

/// Plays the round of a plan. Fails at the first promise that is not kept.
pub fn play(plan: &Plan) -> Report {
    let site = Site::new(plan.size);
    let content = content(plan);
    let place = Arc::new(Place::default());
    let mut report = Report::default();
    let mut image = site.image(plan.first.disk, &content);
    let mut server = serve(&image, plan.first);
    place.open(&server);
    let mut writers = start_writers(plan, &place, &content);
    for hop in &plan.hops {
        let mut troubles = hop.troubles.clone();
        loop {
            let migration = Migration::start(&site, hop, &troubles, &place, server);
            let ended = migration.finish(&writers);
            report.happened.extend(ended.happened);
            (image, troubles) = (ended.image, ended.left);
            let host = Host { disk: Medium::Plain, ..plan.first };
            server = ended.server.unwrap_or_else(|| serve(&image, host));
            place.open(&server);
            if ended.moved {
                report.moved += 1;
                break;
            }
            report.stayed += 1;
        }
    }
    thread::sleep(Duration::from_millis(plan.rest_ms));
    place.end();
    report.requests = writers.iter_mut().map(Writer::join).sum();
    check_all(&writers, &image);
    server.process.signal("TERM");
    assert_eq!(server.process.wait(SOON).code(), Some(0), "{}", server.log());
    report
}

/// What is in the image at first: data and holes in turn.
fn content(plan: &Plan) -> Vec<u8> {
    let mut content = Vec::new();
    for (number, &length) in (0..).zip(&plan.content) {
        let length = length as usize;
        content.extend(if number % 2 == 0 { pattern(number + 1, length) } else { vec![0; length] });
    }
    content
}

/// Each byte of the image belongs to one of them.
fn start_writers(plan: &Plan, place: &Arc<Place>, content: &[u8]) -> Vec<Writer> {
    let starts = [&[0], &plan.borders[..]].concat();
    let ends = [&plan.borders[..], &[plan.size]].concat();
    let ranges = starts.into_iter().zip(ends).map(|(start, end)| (start, &content[start as usize..end as usize]));
    let shadows = ranges.map(|(start, content)| Shadow::new(start, content.to_vec()));
    plan.writers.iter().zip(shadows).map(|(habits, shadow)| Writer::start(habits, place, shadow)).collect()
}
