//! Many short lists of places in one piece of memory.

/// Lists of indices, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lists {
    /// `starts[i]..starts[i + 1]` are list `i`'s places in `items`.
    starts: Vec<u32>,
    items: Vec<u32>,
}

impl Lists {
    /// The lists, in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.starts.windows(2).map(|bounds| &self.items[bounds[0] as usize..bounds[1] as usize])
    }
}

impl<L: IntoIterator<Item = u32>> FromIterator<L> for Lists {
    /// # Panics
    /// When there are 2^32 items or more.
    fn from_iter<I: IntoIterator<Item = L>>(lists: I) -> Self {
        let (mut starts, mut items) = (vec![0], Vec::new());
        for list in lists {
            items.extend(list);
            starts.push(u32::try_from(items.len()).expect("fewer than 2^32 items"));
        }
        Self { starts, items }
    }
}
