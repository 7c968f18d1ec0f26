//! A header list, in two allocations however long it is.

use std::fmt;

use super::{Entry, OVERHEAD};

/// How a field came, and so how it is to go on: whoever sends knows best what is worth a place in the table, and what must
/// never have one (RFC 7541, section 7.1.3).
#[derive(Clone, Debug)]
pub enum Coding {
    /// By an index of the sender's tables.
    Indexed(usize),
    /// As a literal, and into the table.
    Added {
        /// The index its name came by; zero when it came as a literal.
        name: usize,
        /// The place it has in the sender's table now.
        entry: Entry,
    },
    /// As a literal that no table keeps.
    Plain {
        /// The index its name came by; zero when it came as a literal.
        name: usize,
        /// Whether nobody on the way may put it into a table.
        never: bool,
    },
}

#[derive(Clone, Debug)]
struct Field {
    name_end: usize,
    end: usize,
    coding: Coding,
}

/// The fields of one header block, in their order.
///
/// HTTP/2 has names in lower case (RFC 9113, section 8.2.1), but whoever sends may not keep to it.
#[derive(Clone, Default)]
pub struct FieldList {
    /// Every name and its value, one behind the other.
    pub(super) octets: Vec<u8>,
    fields: Vec<Field>,
    resized: bool,
    cut: bool,
}

impl PartialEq for FieldList {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for FieldList {}

impl FieldList {
    /// Without fields, and with room for what a request or an answer usually has.
    pub(super) fn with_room() -> Self {
        Self {
            octets: Vec::with_capacity(512),
            fields: Vec::with_capacity(16),
            resized: false,
            cut: false,
        }
    }

    /// Adds the field whose octets `write` appends, or cuts the list there when it would be longer than `limit`; `write`
    /// says where the name ends, and how the field came.
    pub(super) fn push_with<E>(
        &mut self,
        limit: usize,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(usize, Coding), E>,
    ) -> Result<(), E> {
        let begin = self.octets.len();
        let (name_end, coding) = write(&mut self.octets)?;
        if self.cut || self.size() + OVERHEAD > limit {
            self.cut = true;
            self.octets.truncate(begin);
            return Ok(());
        }
        self.fields.push(Field {
            name_end,
            end: self.octets.len(),
            coding,
        });
        Ok(())
    }

    /// The block changed the size of its sender's table.
    pub(super) fn set_resized(&mut self) {
        self.resized = true;
    }

    /// Whether its block stands for more than was allowed: the fields that are here are the first of it.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Whether its block left its sender's table as it was: a receiver that never sees it reads the next one all the same.
    pub fn leaves_no_trace(&self) -> bool {
        !self.resized
            && !self
                .fields
                .iter()
                .any(|field| matches!(field.coding, Coding::Added { .. }))
    }

    /// Names, values, and how each came.
    pub fn coded(&self) -> impl Iterator<Item = (&[u8], &[u8], &Coding)> {
        self.iter()
            .zip(&self.fields)
            .map(|((name, value), field)| (name, value, &field.coding))
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut begin = 0;
        self.fields.iter().map(move |field| {
            let pair = (
                &self.octets[begin..field.name_end],
                &self.octets[field.name_end..field.end],
            );
            begin = field.end;
            pair
        })
    }

    /// The value of the first field of that name.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter().find(|field| field.0 == name).map(|field| field.1)
    }

    /// Whether there is no field.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    /// What the list counts for (RFC 9113, section 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE).
    pub fn size(&self) -> usize {
        self.octets.len() + self.fields.len() * OVERHEAD
    }
}

impl fmt::Debug for FieldList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lossy = String::from_utf8_lossy;
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (lossy(name), lossy(value))))
            .finish()
    }
}

impl<'a> FromIterator<(&'a [u8], &'a [u8])> for FieldList {
    fn from_iter<I: IntoIterator<Item = (&'a [u8], &'a [u8])>>(fields: I) -> Self {
        let mut list = Self::default();
        for (name, value) in fields {
            list.octets.extend_from_slice(name);
            let name_end = list.octets.len();
            list.octets.extend_from_slice(value);
            list.fields.push(Field {
                name_end,
                end: list.octets.len(),
                coding: Coding::Plain { name: 0, never: false },
            });
        }
        list
    }
}
