//! Optimizers of others that candle doesn't have, from their papers.

mod prodigy;
mod schedule_free;

pub use prodigy::{ParamsProdigy, Prodigy};
pub use schedule_free::{ParamsScheduleFree, ScheduleFreeAdamW};
