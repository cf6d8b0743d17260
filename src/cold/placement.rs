//! Which CPUs the workers run on.
//!
//! Where there are more CPUs than threads, the fastest come first, and one of each core before its second thread; of equal
//! ones those of different NUMA nodes in turn, since every node has a memory of its own to read from. The set has room for
//! the workers and for the thread that launches kernels, and all of them may run on all of it: with one CPU kept from the
//! workers, that thread was found on one of theirs for seconds, and everything took twice as long.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const SYSTEM: &str = "/sys/devices/system/cpu";

/// CPUs in the order in which they are worth having.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    cpus: Vec<usize>,
    /// Of them, how many are the first of their core.
    cores: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Rank {
    /// 0 for the first thread of a core.
    sibling: usize,
    /// Small for fast ones.
    slowness: u64,
    /// How many like it its node has before it.
    turn: usize,
    cpu: usize,
}

impl Placement {
    /// The CPUs that this process may use; `None` where the system does not tell.
    pub fn of_this_process() -> Option<Self> {
        let placement = Placement::new(&allowed()?, &PathBuf::from(SYSTEM));
        (!placement.cpus.is_empty()).then_some(placement)
    }

    /// Orders `allowed` by what `system` (in the layout of sysfs) says of them. What it does not say is taken to be
    /// equal.
    fn new(allowed: &[usize], system: &Path) -> Self {
        let number = |cpu: usize, name: &str| -> Option<u64> {
            fs::read_to_string(system.join(format!("cpu{cpu}/{name}"))).ok()?.trim().parse().ok()
        };
        let core =
            |cpu: usize| (number(cpu, "topology/physical_package_id"), number(cpu, "topology/core_id"));
        let speed = |cpu| {
            number(cpu, "cpu_capacity").or_else(|| number(cpu, "cpufreq/cpuinfo_max_freq")).unwrap_or(0)
        };
        let node = |cpu: usize| -> Option<usize> {
            let mut names =
                fs::read_dir(system.join(format!("cpu{cpu}"))).ok()?.flatten().map(|e| e.file_name());
            names.find_map(|name| name.to_str()?.strip_prefix("node")?.parse().ok())
        };
        let mut seen: Vec<(Option<u64>, Option<u64>)> = Vec::new();
        let mut ranks: Vec<Rank> = Vec::new();
        for &cpu in allowed {
            let core = core(cpu);
            let sibling = if core.1.is_some() { seen.iter().filter(|c| **c == core).count() } else { 0 };
            seen.push(core);
            ranks.push(Rank { sibling, slowness: u64::MAX - speed(cpu), turn: 0, cpu });
        }
        ranks.sort_unstable();
        let mut turns: BTreeMap<(usize, u64, Option<usize>), usize> = BTreeMap::new();
        for rank in &mut ranks {
            let turn = turns.entry((rank.sibling, rank.slowness, node(rank.cpu))).or_default();
            rank.turn = *turn;
            *turn += 1;
        }
        ranks.sort_unstable();
        let cores = ranks.iter().filter(|r| r.sibling == 0).count();
        Placement { cpus: ranks.iter().map(|r| r.cpu).collect(), cores }
    }

    /// How many there are.
    pub fn n_cpus(&self) -> usize {
        self.cpus.len()
    }

    /// How many cores they are on.
    pub fn n_cores(&self) -> usize {
        self.cores
    }

    /// For `n` workers and the thread that launches kernels; `None`: any.
    pub fn workers(&self, n: usize) -> Option<&[usize]> {
        self.cpus.get(..=n).filter(|cpus| cpus.len() < self.cpus.len())
    }
}

#[cfg(target_os = "linux")]
fn allowed() -> Option<Vec<usize>> {
    // SAFETY: the set is plain bytes of the size that is told.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        (libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) == 0).then_some(set)
    }?;
    // SAFETY: the index is below the set's size.
    Some((0..libc::CPU_SETSIZE as usize).filter(|&c| unsafe { libc::CPU_ISSET(c, &set) }).collect())
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> Option<Vec<usize>> {
    None
}

/// Lets the calling thread run on `cpus` only; false where the system refuses.
pub fn run_on(cpus: &[usize]) -> bool {
    let cpus: BTreeSet<usize> = cpus.iter().copied().collect();
    #[cfg(target_os = "linux")]
    // SAFETY: as above.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for cpu in cpus.into_iter().filter(|c| *c < libc::CPU_SETSIZE as usize) {
            libc::CPU_SET(cpu, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) == 0
    }
    #[cfg(not(target_os = "linux"))]
    {
        cpus.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine: core and capacity of each CPU.
    fn machine(cpus: &[(u64, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (cpu, (core, capacity)) in cpus.iter().enumerate() {
            let at = dir.path().join(format!("cpu{cpu}"));
            fs::create_dir_all(at.join("topology")).unwrap();
            fs::write(at.join("topology/physical_package_id"), "0\n").unwrap();
            fs::write(at.join("topology/core_id"), format!("{core}\n")).unwrap();
            fs::write(at.join("cpu_capacity"), format!("{capacity}\n")).unwrap();
        }
        dir
    }

    #[test]
    fn a_thread_of_every_core_comes_before_any_second_one() {
        let m = machine(&[(0, 1), (0, 1), (1, 1), (1, 1)]);
        let p = Placement::new(&[0, 1, 2, 3], m.path());
        assert_eq!(p.cpus, [0, 2, 1, 3]);
        assert_eq!((p.n_cpus(), p.n_cores()), (4, 2));
        assert_eq!(p.workers(1).unwrap(), [0, 2]);
        assert_eq!(p.workers(2).unwrap(), [0, 2, 1]);
        assert_eq!((p.workers(3), p.workers(4)), (None, None), "all of them");
    }

    #[test]
    fn performance_cores_come_first() {
        let m = machine(&[(0, 400), (1, 400), (2, 1024), (3, 1024)]);
        assert_eq!(Placement::new(&[0, 1, 2, 3], m.path()).cpus, [2, 3, 0, 1]);
    }

    #[test]
    fn nodes_take_turns() {
        let m = machine(&[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)]);
        for (cpu, node) in [0, 0, 0, 0, 1, 1].into_iter().enumerate() {
            fs::create_dir(m.path().join(format!("cpu{cpu}/node{node}"))).unwrap();
        }
        let p = Placement::new(&[0, 1, 2, 3, 4, 5], m.path());
        assert_eq!(p.cpus, [0, 4, 1, 5, 2, 3]);
        assert_eq!(
            Placement::new(&[0, 1, 2, 3], m.path()).cpus,
            [0, 1, 2, 3],
            "only those of one node are allowed"
        );
    }

    #[test]
    fn only_what_is_allowed_is_used_and_silence_means_equal() {
        let p = Placement::new(&[5, 9, 7], Path::new("/nowhere"));
        assert_eq!(p.cpus, [5, 7, 9]);
        assert_eq!(p.n_cores(), 3);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_moves_where_it_is_told() {
        let p = Placement::of_this_process().unwrap();
        let last = p.cpus[p.n_cpus() - 1];
        std::thread::spawn(move || {
            assert!(run_on(&[last]));
            assert_eq!(allowed().unwrap(), [last]);
            assert!(!run_on(&[]), "no CPU at all is refused");
        })
        .join()
        .unwrap();
    }
}
