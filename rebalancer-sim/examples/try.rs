use rebalancer_core::{policy::Policy, words::ApiserverName};
use rebalancer_sim::{figures::summarise, setup::*, simulate};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let seeds: u64 = args[2].parse().unwrap();
    for contender in [Contender::Rebalancer, Contender::GoawayChance(0.001)] {
        let t = std::time::Instant::now();
        let mut policy = Policy::new(ApiserverName::new("x"), Default::default());
        policy.skew_target = 0.05;
        let setup = Setup::of_loads(&[500, 500, 0], args[1].parse().unwrap(), policy);
        let runs: Vec<_> = (0..seeds).map(|s| simulate(&setup, contender, s)).collect();
        println!("{contender} {:?} {:?}", summarise(&runs), t.elapsed());
        if let Some(r) = runs.first() {
            println!("{:?} {:?} {} {}", r.holds, r.explanations, r.plans, r.decisions);
        }
    }
}
