//! What the opaque handles of the C ABI stand for.
//!
//! A handle is a number that is given once and never followed as an address. So one that was freed, or that this
//! library never gave, is found out instead of read, and a call that runs while its object is freed keeps the object.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

struct Table<T> {
    live: BTreeMap<usize, Arc<T>>,
    last: usize,
}

/// The live objects of one type.
pub struct Handles<T>(Mutex<Table<T>>);

impl<T> Handles<T> {
    /// None yet.
    pub const fn new() -> Self {
        Handles(Mutex::new(Table { live: BTreeMap::new(), last: 0 }))
    }

    /// A handle for `object`. Small, so that no address of the caller's equals it.
    pub fn add(&self, object: T) -> usize {
        let mut table = self.0.lock();
        table.last += 1;
        let handle = table.last;
        table.live.insert(handle, Arc::new(object));
        handle
    }

    /// The object of a live handle.
    pub fn get(&self, handle: usize) -> Option<Arc<T>> {
        self.0.lock().live.get(&handle).cloned()
    }

    /// Gives a live handle another object, if `when` says so of the one that it has; returns what it does not keep.
    ///
    /// # Errors
    /// `object`, when the handle is not live or `when` says no.
    pub fn replace(&self, handle: usize, object: T, when: impl Fn(&T) -> bool) -> Result<Arc<T>, T> {
        match self.0.lock().live.get_mut(&handle).filter(|old| when(old)) {
            Some(old) => Ok(std::mem::replace(old, Arc::new(object))),
            None => Err(object),
        }
    }

    /// Ends a handle; its object, if it was live.
    pub fn remove(&self, handle: usize) -> Option<Arc<T>> {
        self.0.lock().live.remove(&handle)
    }
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_never_given_twice() {
        let handles = Handles::new();
        let a = handles.add("a");
        let held = handles.get(a).unwrap();
        assert_eq!(handles.remove(a).as_deref(), Some(&"a"));
        assert!(handles.get(a).is_none() && handles.remove(a).is_none());
        assert_eq!(*held, "a", "who has it keeps it");
        assert_ne!(handles.add("b"), a);
        assert!(handles.get(0).is_none() && handles.get(usize::MAX).is_none());
    }

    #[test]
    fn an_object_is_replaced_once() {
        let handles = Handles::new();
        let a = handles.add(1);
        let replace = |by| handles.replace(a, by, |old| *old == 1);
        assert_eq!(replace(2).as_deref(), Ok(&1));
        assert_eq!((replace(3), handles.get(a).as_deref()), (Err(3), Some(&2)));
        handles.remove(a);
        assert_eq!(handles.replace(a, 4, |_| true), Err(4));
    }
}
