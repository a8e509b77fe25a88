//! The formats of state: how rows of it are converted to and from the compute type.

use super::gradient::{Compute, RowBuffer};
use crate::state::{Slot, State};

/// The state of neighbouring elements of a block, in some format. A packed format decodes its numbers into `room`,
/// and encodes them from there after they have changed.
pub(crate) trait StateRows<C>: Send + Sync + Sized {
    /// Splits off the first `len` elements.
    fn take(&mut self, len: usize) -> Self;

    /// Elements `start..start + len`, to be read.
    fn read<'r>(&'r self, start: usize, len: usize, room: &'r mut Room) -> Row<'r, C>;

    /// All elements, at most a row of lanes, to be changed; [`StateRows::store`] must follow.
    fn load<'r>(&'r mut self, room: &'r mut Room) -> RowMut<'r, C>;

    /// Stores what was changed after [`StateRows::load`].
    fn store(&mut self, room: &mut Room);
}

/// Buffers for a row of each kind of state.
pub(crate) type Room = [RowBuffer; 5];

/// A row of each kind of state that exists.
pub(crate) struct Row<'r, C> {
    pub m: Option<&'r [C]>,
    pub v: Option<&'r [C]>,
    pub average: Option<&'r [C]>,
    pub q: Option<&'r [C]>,
}

/// The same, to be changed.
pub(crate) struct RowMut<'r, C> {
    pub master: Option<&'r mut [C]>,
    pub m: Option<&'r mut [C]>,
    pub v: Option<&'r mut [C]>,
    pub average: Option<&'r mut [C]>,
    pub q: Option<&'r mut [C]>,
}

/// State of f32 or f64, stored as it is computed with.
pub(crate) struct Exact<'a, C> {
    pub master: Option<&'a mut [C]>,
    m: Option<&'a mut [C]>,
    v: Option<&'a mut [C]>,
    average: Option<&'a mut [C]>,
    q: Option<&'a mut [C]>,
}

impl<'a, C: Compute> Exact<'a, C> {
    pub fn new(state: &'a mut State) -> Self {
        fn numbers<C: Compute>(slot: &mut Option<Slot>) -> Option<&mut [C]> {
            slot.as_mut().and_then(Slot::cpu_mut).and_then(C::numbers_mut)
        }
        let State { master, m, v, average, q } = state;
        let [master, m, v, average, q] = [master, m, v, average, q].map(numbers);
        Self { master, m, v, average, q }
    }
}

impl<C: Compute> StateRows<C> for Exact<'_, C> {
    #[inline(always)]
    fn take(&mut self, len: usize) -> Self {
        fn first<'a, C>(slot: &mut Option<&'a mut [C]>, len: usize) -> Option<&'a mut [C]> {
            slot.as_mut().map(|slot| slot.split_off_mut(..len).unwrap_or_default())
        }
        let Self { master, m, v, average, q } = self;
        let [master, m, v, average, q] = [master, m, v, average, q].map(|slot| first(slot, len));
        Self { master, m, v, average, q }
    }

    #[inline(always)]
    fn read<'r>(&'r self, start: usize, len: usize, _: &'r mut Room) -> Row<'r, C> {
        #[inline(always)]
        fn row<'r, C>(slot: &'r Option<&mut [C]>, start: usize, len: usize) -> Option<&'r [C]> {
            slot.as_deref().map(|slot| &slot[start..start + len])
        }
        let row = |slot| row(slot, start, len);
        let Self { m, v, average, q, .. } = self;
        Row { m: row(m), v: row(v), average: row(average), q: row(q) }
    }

    #[inline(always)]
    fn load<'r>(&'r mut self, _: &'r mut Room) -> RowMut<'r, C> {
        let Self { master, m, v, average, q } = self;
        RowMut {
            master: master.as_deref_mut(),
            m: m.as_deref_mut(),
            v: v.as_deref_mut(),
            average: average.as_deref_mut(),
            q: q.as_deref_mut(),
        }
    }

    #[inline(always)]
    fn store(&mut self, _: &mut Room) {}
}
