//! `moe-hot replay`: every policy at any budget on recorded routing. All configurations of all traces run
//! in parallel, with the traces in memory.

use std::path::PathBuf;

use clap::ValueEnum;
use moe_hot::{
    cost::CostFile,
    plot::{self, Line},
    policy::{PolicyKind, PolicySpec},
    replay::{self, Outcome, Routing, Scope},
};

use crate::{parallel, read, table};

#[derive(clap::Args)]
pub struct Args {
    /// Routing traces. With several, rows named 'all' sum over them.
    #[arg(required = true)]
    traces: Vec<PathBuf>,
    /// Slots per layer.
    #[arg(long, value_delimiter = ',', conflicts_with = "budget", value_parser = clap::value_parser!(u32).range(1..))]
    k: Vec<u32>,
    /// Share of each layer's experts that have a slot, instead of --k.
    #[arg(long, value_delimiter = ',', default_value = "12.5%,25%,37.5%", value_parser = share)]
    budget: Vec<f64>,
    /// Tokens between two plans.
    #[arg(long, value_delimiter = ',', default_value = "4", value_parser = clap::value_parser!(u32).range(1..))]
    interval: Vec<u32>,
    /// Policies, each NAME[:KEY=VALUE...] as in --moe-hot-policy [default: all].
    #[arg(long, value_name = "POLICY,...", value_parser = policies)]
    policy: Vec<Policies>,
    /// Uses of experts for each one that a plan may upload [default: as in the recorded run, which is 8 with
    /// slots in VRAM and 64 in host memory].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    uses_per_upload: Option<u32>,
    /// What steps cost on a machine, by moe-hot probe -m: predicts tokens a second.
    #[arg(long, value_name = "FILE")]
    cost: Option<PathBuf>,
    /// Comma-separated values instead of a table.
    #[arg(long)]
    csv: bool,
    /// A picture of the outcome against the budget: .png or .svg.
    #[arg(long, value_name = "FILE", value_parser = picture)]
    plot: Option<PathBuf>,
    /// What the picture shows.
    #[arg(long, value_enum, default_value_t = PlotOf::Reads)]
    plot_of: PlotOf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PlotOf {
    /// Uses of cold experts as a multiple of the optimum's.
    Reads,
    /// Share of uses that found a slot.
    HitRate,
}

fn share(text: &str) -> Result<f64, String> {
    let percent = text.strip_suffix('%').and_then(|p| p.trim().parse::<f64>().ok());
    percent
        .filter(|p| *p > 0.0 && *p <= 100.0)
        .map(|p| p / 100.0)
        .ok_or("expected more than 0% and at most 100%, such as 12.5%".into())
}

fn picture(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    plot::check_name(&path).map(|()| path)
}

/// Policies separated by commas: the constants of each may be too, so clap cannot tell them apart.
#[derive(Clone)]
struct Policies(Vec<PolicySpec>);

fn policies(text: &str) -> Result<Policies, String> {
    PolicySpec::list(text).map(Policies).map_err(|e| format!("expected {e}"))
}

/// What is run over a trace.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Contender {
    Optimum(Scope),
    Hindsight,
    Policy { spec: PolicySpec, interval: u32 },
}

impl Contender {
    fn name(self) -> String {
        match self {
            Contender::Optimum(Scope::Pool) => "optimum".into(),
            Contender::Optimum(Scope::Layer) => "optimum/layer".into(),
            Contender::Hindsight => "hindsight".into(),
            Contender::Policy { spec, .. } => spec.to_string(),
        }
    }

    fn interval(self) -> Option<u32> {
        match self {
            Contender::Policy { interval, .. } => Some(interval),
            _ => None,
        }
    }

    fn run(self, routing: &Routing, k: u32) -> Outcome {
        match self {
            Contender::Optimum(scope) => replay::optimum(routing, k, scope),
            Contender::Hindsight => replay::hindsight(routing, k),
            Contender::Policy { spec, interval } => replay::replay(routing, spec, k, interval, |_, _, _| {}),
        }
    }
}

struct Trace {
    name: String,
    routing: Routing,
}

impl Trace {
    /// Most experts of a layer.
    fn n_expert(&self) -> u32 {
        self.routing.header.layers.iter().map(|l| u32::from(l.n_expert)).max().unwrap_or(0)
    }

    /// Experts of all layers.
    fn n_experts(&self) -> u64 {
        self.routing.header.layers.iter().map(|l| u64::from(l.n_expert)).sum()
    }
}

/// The budgets as slots a layer of one trace.
fn slots(args: &Args, trace: &Trace) -> Result<Vec<u32>, String> {
    let n_expert = trace.n_expert();
    if args.k.is_empty() {
        let k = |share: &f64| ((share * f64::from(n_expert)).round() as u32).clamp(1, n_expert.max(1));
        return Ok(args.budget.iter().map(k).collect());
    }
    match args.k.iter().find(|k| **k > n_expert) {
        Some(k) => Err(format!("--k: {k} is not allowed, {} has {n_expert} experts a layer", trace.name)),
        None => Ok(args.k.clone()),
    }
}

/// Names of files, or their paths where two files have the same.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let name = |p: &PathBuf| p.file_name().unwrap_or(p.as_os_str()).to_string_lossy().into_owned();
    let short: Vec<String> = paths.iter().map(name).collect();
    let unique = |n: &String| short.iter().filter(|m| *m == n).count() == 1;
    paths
        .iter()
        .zip(&short)
        .map(|(p, n)| if unique(n) { n.clone() } else { p.display().to_string() })
        .collect()
}

const HEAD: [&str; 11] = [
    "trace",
    "policy",
    "k",
    "interval",
    "hit rate",
    "cold/token",
    "reads/optimum",
    "uploads",
    "hits/upload",
    "bytes/token",
    "tok/s",
];

/// A line of the table.
struct Row {
    contender: Contender,
    k: Option<u32>,
    /// Share of the experts that have a slot.
    share: f64,
    outcome: Outcome,
    /// The optimum's over the pool.
    best: Outcome,
}

impl Row {
    fn reads(&self) -> f64 {
        self.outcome.misses as f64 / self.best.misses.max(1) as f64
    }

    /// The optimum is a bound: its copies are for free.
    fn tokens_per_s(&self, cost: &CostFile) -> f64 {
        let bound = matches!(self.contender, Contender::Optimum(_));
        let uploads = if bound { 0 } else { self.outcome.uploads };
        cost.cost.tokens_per_s(&Outcome { uploads, ..self.outcome })
    }

    fn cells(&self, trace: &str, cost: Option<&CostFile>) -> Vec<String> {
        let o = &self.outcome;
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        vec![
            trace.into(),
            self.contender.name(),
            or_dash(self.k.map(|k| k.to_string())),
            or_dash(self.contender.interval().map(|i| i.to_string())),
            format!("{:.4}", o.hit_rate()),
            format!("{:.2}", o.cold_per_token()),
            format!("{:.3}", self.reads()),
            o.uploads.to_string(),
            or_dash(o.hits_per_upload().map(|h| format!("{h:.1}"))),
            format!("{:.0}", o.bytes_per_token()),
            or_dash(cost.map(|c| format!("{:.2}", self.tokens_per_s(c)))),
        ]
    }
}

fn lines(rows: &[Row], contenders: &[Contender], of: PlotOf, intervals: usize) -> Vec<Line> {
    let line = |contender: &Contender| {
        let value = |r: &Row| if of == PlotOf::Reads { r.reads() } else { r.outcome.hit_rate() };
        let mut points: Vec<_> =
            rows.iter().filter(|r| r.contender == *contender).map(|r| (r.share, value(r))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let interval = contender.interval().filter(|_| intervals > 1);
        Line {
            name: contender.name() + &interval.map(|i| format!(", interval {i}")).unwrap_or_default(),
            bound: *contender == Contender::Optimum(Scope::Pool),
            points,
        }
    };
    contenders.iter().map(line).collect()
}

pub fn run(args: &Args) -> Result<(), String> {
    let named = |path: &PathBuf, e: String| format!("--cost: {}: {e}", path.display());
    let cost = match &args.cost {
        Some(path) => Some(CostFile::read(path).map_err(|e| format!("--cost: {e}"))?),
        None => None,
    };
    let names = names(&args.traces);
    let traces = parallel::map(names.len(), |i| {
        read(&args.traces[i]).map(|mut routing| {
            let header = &mut routing.header;
            header.uses_per_upload = args.uses_per_upload.unwrap_or(header.uses_per_upload);
            Trace { name: names[i].clone(), routing }
        })
    });
    let traces: Vec<Trace> = traces.into_iter().collect::<Result<_, _>>()?;
    if let (Some(cost), Some(path)) = (&cost, &args.cost) {
        for t in &traces {
            let fits = cost.check_model(t.routing.header.fingerprint);
            fits.map_err(|e| named(path, format!("{e} ({})", t.name)))?;
        }
    }
    let slots = traces.iter().map(|t| slots(args, t)).collect::<Result<Vec<_>, _>>()?;
    let n_budgets = slots.first().map_or(0, Vec::len);

    let policies: Vec<PolicySpec> = if args.policy.is_empty() {
        PolicyKind::all().map(PolicySpec::from).collect()
    } else {
        args.policy.iter().flat_map(|p| p.0.clone()).collect()
    };
    let mut contenders =
        vec![Contender::Optimum(Scope::Pool), Contender::Optimum(Scope::Layer), Contender::Hindsight];
    for &interval in &args.interval {
        contenders.extend(policies.iter().map(|&spec| Contender::Policy { spec, interval }));
    }
    let n = contenders.len();
    // by trace, then budget, then contender
    let outcomes = parallel::map(traces.len() * n_budgets * n, |i| {
        let (trace, budget) = (i / n / n_budgets, i / n % n_budgets);
        contenders[i % n].run(&traces[trace].routing, slots[trace][budget])
    });

    let rows_of = |of: std::ops::Range<usize>| {
        let mut rows = Vec::new();
        for b in 0..n_budgets {
            let sum = |c: usize| {
                let mut outcomes = of.clone().map(|t| outcomes[(t * n_budgets + b) * n + c]);
                let first = outcomes.next().unwrap_or_default();
                outcomes.fold(first, |mut sum, o| {
                    sum += o;
                    sum
                })
            };
            let ks: Vec<u32> = of.clone().map(|t| slots[t][b]).collect();
            let held: u64 = of
                .clone()
                .map(|t| u64::from(slots[t][b]) * traces[t].routing.header.layers.len() as u64)
                .sum();
            let all: u64 = of.clone().map(|t| traces[t].n_experts()).sum();
            for (c, &contender) in contenders.iter().enumerate() {
                rows.push(Row {
                    contender,
                    k: ks.iter().all(|k| *k == ks[0]).then(|| ks[0]),
                    share: (held as f64 / all.max(1) as f64).min(1.0),
                    outcome: sum(c),
                    best: sum(0),
                });
            }
        }
        rows
    };
    let all = rows_of(0..traces.len());
    let mut cells = vec![HEAD.map(String::from).to_vec()];
    for (t, trace) in traces.iter().enumerate() {
        cells.extend(rows_of(t..t + 1).iter().map(|r| r.cells(&trace.name, cost.as_ref())));
    }
    if traces.len() > 1 {
        cells.extend(all.iter().map(|r| r.cells("all", cost.as_ref())));
    }
    if let Some(path) = &args.plot {
        let value = if args.plot_of == PlotOf::Reads { "reads / optimum" } else { "hit rate" };
        let title =
            if let [name] = names.as_slice() { name.clone() } else { format!("{} traces", names.len()) };
        let lines = lines(&all, &contenders, args.plot_of, args.interval.len());
        plot::draw(path, &title, value, &lines).map_err(|e| format!("--plot: {e}"))?;
    }
    table::print(&cells, 2, args.csv)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_share_in_percent() {
        assert_eq!(share("12.5%"), Ok(0.125));
        assert_eq!(share("100%"), Ok(1.0));
        for bad in ["12.5", "0%", "-1%", "100.1%", "%", "nan%", "inf%", ""] {
            assert_eq!(
                share(bad),
                Err("expected more than 0% and at most 100%, such as 12.5%".into()),
                "{bad}"
            );
        }
    }

    #[test]
    fn files_of_one_name_are_told_apart() {
        let paths = ["a/x.trace", "b/x.trace", "b/y.trace"].map(PathBuf::from);
        assert_eq!(names(&paths), ["a/x.trace", "b/x.trace", "y.trace"]);
    }
}
