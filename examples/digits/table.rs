//! The tables that are printed.

use crate::train::{GRID, Outcome, Rule, TUNING_EPOCHS, Trial, best};

/// Of the trials of each rule, one for each learning rate of the grid.
pub fn print_trials(columns: &[(Rule, Vec<Trial>)]) {
    println!("Validation accuracy (loss) after {TUNING_EPOCHS} epochs; * is the best:");
    print!("{:>6}", "lr");
    for (rule, _) in columns {
        print!("{rule:>18}");
    }
    println!();
    for (i, lr) in GRID.iter().enumerate() {
        print!("{lr:>6?}");
        for (_, trials) in columns {
            let Trial { accuracy, loss, .. } = trials[i];
            let mark = if best(trials).is_some_and(|best| best.lr == *lr) { '*' } else { ' ' };
            print!("{:>18}", format!("{:.2}% ({loss:.3}){mark}", 100. * accuracy));
        }
        println!();
    }
    println!();
}

pub fn print_outcomes(outcomes: &[Outcome], tuned: bool) {
    let lr = if tuned { "tuned lr" } else { "given lr" };
    println!(
        "{:<9}  {lr:>8}  {:>17}  {:>16}  {:>11}  {:>7}",
        "optimizer", "held-out accuracy", "final train loss", "evaluations", "seconds"
    );
    for Outcome { rule, lr, accuracy, history } in outcomes {
        let loss = history.loss.last().map_or(f64::NAN, |&(_, loss)| loss);
        println!(
            "{rule:<9}  {lr:>8?}  {:>16.2}%  {loss:>16.3e}  {:>11}  {:>7.2}",
            100. * accuracy,
            history.evaluations,
            history.seconds
        );
    }
    println!("Evaluations (gradients of a batch) and seconds are those of the final training.");
}
