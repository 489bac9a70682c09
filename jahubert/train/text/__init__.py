"""Japanese text processing: conversion of text to words and phones, and tokenization."""
