//! How slots change hands while steps read them: retire, copy, publish, with the pool as it is.

use super::*;
use crate::{
    model_loom::{N_EXPERT, SMALL, check, prepare},
    policy::PolicyKind,
};

/// A pool of one slot for two experts, with a plan after every token.
fn pool() -> Arc<Model> {
    pool_of(1, 0)
}

/// A pool of `k` slots, with `threads` workers.
fn pool_of(k: u32, threads: u32) -> Arc<Model> {
    let config = Config {
        k: Some(k),
        rebalance_interval: 1,
        policy: Some(PolicyKind::Lru.into()),
        threads: Some(threads),
        ..Config::default()
    };
    let model = Model::new(config);
    model.offer(Offer { layer: SMALL.clone(), device: None, max_tokens: 0 });
    assert!(model.activate(1, "test"));
    Arc::new(model)
}

fn begin(model: &Model, id: u64) {
    model.step_begin(id, true, true);
}

fn end(model: &Model, id: u64, expert: u16) {
    let mut usage = StepUsage::new(1);
    usage.begin(1, &[]);
    usage.ids[0].push(expert);
    usage.cold[0] = u32::from(model.map(0).slot(expert.into()) < 0);
    model.step_end(id, true, &usage, Took::default());
}

/// What a step does with the slots: it looks up both experts, and reads those that are there.
fn read(model: &Model) -> usize {
    read_by(model, |expert| model.map(0).slot(expert))
}

/// The same for a device, which gets a copy of the map.
fn read_by_copy(model: &Model) -> usize {
    let mut map = [0; N_EXPERT];
    model.map(0).copy_to(&mut map);
    read_by(model, |expert| map[expert])
}

fn read_by(model: &Model, slot: impl Fn(usize) -> i32) -> usize {
    let mut found = 0;
    for expert in 0..N_EXPERT {
        let slot = slot(expert);
        let Ok(slot) = usize::try_from(slot) else { continue };
        found += 1;
        for (m, memory) in SMALL.matrices().zip(&model.class_of(0).memory) {
            let SlotMemory::Host(memory) = &**memory else { unreachable!("in host memory") };
            let mut bytes = vec![0; m.expert_bytes];
            memory.read(slot * m.expert_bytes, &mut bytes);
            // SAFETY: the weights of an expert are there, and nobody writes them.
            let own = unsafe { std::slice::from_raw_parts(m.row(expert, 0), m.expert_bytes) };
            assert!(bytes == own, "slot {slot} has other bytes than expert {expert}");
        }
    }
    found
}

fn step(model: &Model, id: u64, expert: u16) {
    begin(model, id);
    read(model);
    end(model, id, expert);
}

/// Expert 0 has the slot, and after `steps` more steps one begins that retires it for expert 1.
fn about_to_swap(steps: usize) -> Arc<Model> {
    prepare(|| {
        let model = pool();
        while model.map(0).slot(0) < 0 {
            step(&model, 0, 0);
            model.settle();
        }
        step(&model, 0, 1);
        // a step wishes for the plan, the one after it brings it about
        (steps..1).for_each(|_| step(&model, 0, 1));
        assert_eq!((model.map(0).slot(0), model.map(0).slot(1)), (0, -1));
        model
    })
}

#[test]
fn loom_a_step_never_reads_a_slot_that_changes() {
    for look in [read, read_by_copy] {
        check(move || {
            let model = about_to_swap(1);
            let other = model.clone();
            let other = thread::spawn(move || {
                begin(&other, 2);
                // a layer after the other
                look(&other);
                look(&other);
                end(&other, 2, 1);
            });
            step(&model, 1, 1);
            step(&model, 1, 1);
            other.join().unwrap();
            model.settle();
            begin(&model, 1);
            assert_eq!((model.map(0).slot(0), model.map(0).slot(1)), (-1, 0), "the swap has ended");
            read(&model);
            end(&model, 1, 1);
        });
    }
}

#[test]
fn loom_who_copies_a_map_learns_of_every_later_change() {
    check(|| {
        let model = about_to_swap(0);
        let other = model.clone();
        // a context with a device: the version first, then the map
        let other = thread::spawn(move || {
            let version = other.map_version();
            let mut map = [0; N_EXPERT];
            other.map(0).copy_to(&mut map);
            (version, map)
        });
        begin(&model, 1);
        let (version, map) = other.join().unwrap();
        let mut now = [0; N_EXPERT];
        model.map(0).copy_to(&mut now);
        assert!(version < model.map_version() || map == now, "{map:?} instead of {now:?}");
        end(&model, 1, 1);
    });
}

/// A pool that has grown, and has all experts in slots, in their order.
#[cfg(not(loom))]
fn filled(model: &Model) {
    let fill = |expert: u16| {
        while model.map(0).slot(expert.into()) < 0 {
            step(model, 0, expert);
            model.settle();
        }
    };
    fill(0);
    model.resize((N_EXPERT * SMALL.expert_bytes()) as u64).unwrap();
    fill(1);
    assert_eq!((model.map(0).slot(0), model.map(0).slot(1)), (0, 1));
}

#[cfg(not(loom))]
#[test]
fn a_context_keeps_the_nodes_that_it_began_with() {
    let model = pool();
    let context = |id| crate::context::Context::new(id, model.clone()).unwrap();
    let early = context(1);
    filled(&model);
    assert_eq!((early.resident_from(0), context(2).resident_from(0)), (None, Some(0)));
}

#[cfg(not(loom))]
#[test]
fn workers_wake_only_for_contexts_that_may_have_cold_experts() {
    for (k, awake) in [(1, true), (N_EXPERT as u32, false)] {
        let model = pool_of(k, 1);
        let workers = || &model.pool().workers;
        let until = |parked: u32| {
            let start = Instant::now();
            while workers().parked() != parked && start.elapsed() < Duration::from_secs(20) {
                thread::yield_now();
            }
            assert_eq!(workers().parked(), parked, "{k} slots");
        };
        let context = crate::context::Context::new(1, model.clone()).unwrap();
        let all = workers().len() as u32;
        until(all);
        assert!(context.step_begin(1, &[0]).unwrap());
        if awake {
            until(0);
        }
        thread::sleep(Duration::from_millis(20));
        assert_eq!(workers().parked(), if awake { 0 } else { all }, "{k} slots");
        context.step_end().unwrap();
        until(all);
    }
}

#[cfg(not(loom))]
#[test]
fn slots_that_are_about_to_close_are_nobodys_for_good() {
    let model = pool();
    filled(&model);
    begin(&model, 1);
    // what cannot happen before the step ends
    model.pool().want(SMALL.expert_bytes() as u64);
    assert_eq!(model.resident_from(0), None);
    end(&model, 1, 0);
    begin(&model, 1);
    assert_eq!(model.n_slots(), 1);
    end(&model, 1, 0);
    assert_eq!(model.resident_from(0), None);
}

#[cfg(not(loom))]
#[test]
fn who_asks_for_no_slots_gets_none() {
    let model = Model::new(Config::default());
    model.offer(Offer { layer: SMALL.clone(), device: None, max_tokens: 0 });
    assert!(!model.activate(1, "test"));
}
