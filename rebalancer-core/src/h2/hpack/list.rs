//! A header list, in two allocations however long it is.

use std::fmt;

use super::OVERHEAD;

/// The fields of one header block, in their order.
///
/// HTTP/2 has names in lower case (RFC 9113, section 8.2.1), but whoever sends may not keep to it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct FieldList {
    /// Every name and its value, one behind the other.
    octets: Vec<u8>,
    /// For each field, where its name ends and where its value does.
    ends: Vec<(usize, usize)>,
}

impl FieldList {
    /// Without fields, and with room for what a request or an answer usually has.
    pub(super) fn with_room() -> Self {
        Self {
            octets: Vec::with_capacity(512),
            ends: Vec::with_capacity(16),
        }
    }

    /// Adds the field whose octets `write` appends; it says where the name ends.
    pub(super) fn push_with<E>(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> Result<usize, E>,
    ) -> Result<(&[u8], &[u8]), E> {
        let begin = self.octets.len();
        let name_end = write(&mut self.octets)?;
        self.ends.push((name_end, self.octets.len()));
        Ok((&self.octets[begin..name_end], &self.octets[name_end..]))
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut begin = 0;
        self.ends.iter().map(move |(name_end, end)| {
            let field = (&self.octets[begin..*name_end], &self.octets[*name_end..*end]);
            begin = *end;
            field
        })
    }

    /// The value of the first field of that name.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter().find(|field| field.0 == name).map(|field| field.1)
    }

    /// Whether there is no field.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// What the list counts for (RFC 9113, section 6.5.2, SETTINGS_MAX_HEADER_LIST_SIZE).
    pub fn size(&self) -> usize {
        self.octets.len() + self.ends.len() * OVERHEAD
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
            list.ends.push((name_end, list.octets.len()));
        }
        list
    }
}
