//! The tables that are printed.

use crate::study::{Row, Run, Study};

pub fn print(studies: &[Study]) {
    print_shown(studies);
    println!(
        "Every gradient is counted: a step of braked Adam that measures the curvature takes two.\n\
         \"In all\": those of every training that the choice of the learning rate took. Seconds are those\n\
         of trainings side by side, on a thread each."
    );
    if studies.iter().any(|study| study.rows.len() > 1) {
        println!("\nHeld-out accuracy at each learning rate; * is in the table above:");
        print_rates(studies);
    }
    println!();
}

/// Each optimizer at the learning rate that stands for it.
fn print_shown(studies: &[Study]) {
    println!(
        "{:<11}  {:<19}  {:>17}  {:>13}  {:>5}  {:>9}  {:>6}  {:>7}",
        "optimizer",
        "learning rate",
        "held-out accuracy",
        "training loss",
        "steps",
        "gradients",
        "in all",
        "seconds"
    );
    for study in studies {
        let row = study.shown();
        let lr = format!("{:?}, {}", row.lr, study.origin());
        let gradients = |row: &Row| row.mean(|run| run.training.gradients as f64);
        let in_all = match study.searched() {
            true => study.rows.iter().map(gradients).sum(),
            false => gradients(row),
        };
        println!(
            "{:<11}  {lr:<19}  {:>17}  {:>13.2e}  {:>5.0}  {:>9.0}  {in_all:>6.0}  {:>7.2}",
            study.rule.name(),
            accuracy(row),
            row.mean(|run| run.train_loss),
            row.mean(|run| run.training.steps as f64),
            gradients(row),
            row.mean(|run| run.seconds),
        );
    }
}

fn print_rates(studies: &[Study]) {
    print!("{:>7}", "lr");
    studies.iter().for_each(|study| print!("{:>18}", study.rule.name()));
    println!();
    let rows = studies.iter().flat_map(|study| &study.rows);
    let mut rates: Vec<f64> = rows.map(|row| row.lr).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    for lr in rates {
        print!("{lr:>7?}");
        for study in studies {
            let row = study.rows.iter().find(|row| row.lr == lr);
            let mark = if study.shown().lr == lr { '*' } else { ' ' };
            print!("{:>17}{mark}", row.map_or(String::new(), accuracy));
        }
        println!();
    }
}

/// The mean over the seeds, and where there are several their standard deviation.
fn accuracy(row: &Row) -> String {
    let value = |run: &Run| 100. * run.held_out.accuracy;
    let mean = row.mean(value);
    match row.deviation(value) {
        _ if row.broke_off() => "diverged".into(),
        Some(deviation) => format!("{mean:.2}% +- {deviation:.2}"),
        None => format!("{mean:.2}%"),
    }
}
