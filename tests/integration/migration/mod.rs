//! Migrations: as they should go, and whatever may come between.

mod disc;
mod faults;
mod itself;
mod load;
mod marks;
mod net;
mod ordinary;
mod relay;
mod slow_disk;
