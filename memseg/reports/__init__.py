"""Values in, text, tables or a page out; nothing here measures, plans or prints."""
